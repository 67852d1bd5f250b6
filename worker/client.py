"""The former name of `holdfast_client.client`, for programs that use it."""

from holdfast_client.client import *  # noqa: F403
