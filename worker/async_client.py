"""The former name of `holdfast_client.async_client`, for programs that use it."""

from holdfast_client.async_client import *  # noqa: F403
