"""The header Prefer (RFC 7240): how long a client would like to wait for the answer to its message."""

import re
from urllib.request import parse_http_list

from fastapi import Request

MOST_WAIT_S = 20
"""The longest wait, in seconds. A longer one that is preferred is shortened to it."""


def preferred_wait_s(request: Request) -> int:
    """How many seconds the client prefers to wait, at most MOST_WAIT_S.

    0: not at all, or it does not say so in a way that can be understood. A server ignores such a preference. Of several
    waits the first one counts.
    """
    for preference in parse_http_list(",".join(request.headers.getlist("prefer"))):
        name, _, value = preference.partition(";")[0].partition("=")
        if name.strip().lower() == "wait":
            seconds = value.strip().removeprefix('"').removesuffix('"')
            if not re.fullmatch("[0-9]+", seconds):
                return 0
            return MOST_WAIT_S if len(seconds.lstrip("0")) > 9 else min(int(seconds[-9:]), MOST_WAIT_S)
    return 0


def applied(wait_s: int) -> dict[str, str]:
    """The header of an answer for which `wait_s` seconds were waited, or would have been."""
    return {"Preference-Applied": f"wait={wait_s}"}
