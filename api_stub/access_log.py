"""Filters of the server's access log: they leave out tokens, and health checks that succeed."""

import logging
import re
from http import HTTPStatus


def _as_written(text: str) -> str:
    """A pattern for `text` in an address, with each character percent-encoded any number of times."""
    return "".join(f"(?:{re.escape(character)}|%(?:25)*{ord(character):x})" for character in text)


_TOKEN = re.compile(
    rf"((?:{_as_written('?')}|{_as_written('&')}){_as_written('token=')})(?:(?!{_as_written('&')})\S)+", re.IGNORECASE
)

_ANY_TOKEN = re.compile(r"eyJ[\w-]+(?:\.|%(?:25)*2e)[\w-]+(?:\.|%(?:25)*2e)[\w-]+", re.IGNORECASE)
"""A token anywhere in an address, as by mistake: three parts, of which the first is a JSON object in base64."""


def install() -> None:
    """Install the filters. A second call changes nothing."""
    log = logging.getLogger("uvicorn.access")
    for keep in (_is_worth_a_line, _keep_tokens_out):
        log.addFilter(keep)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """Whether to log a request: not a health check that succeeds, as there is one every few seconds."""
    match record.args:
        case (_, _, str(path), _, int(status)):
            return path.partition("?")[0] not in ("/healthz", "/readyz") or status >= HTTPStatus.BAD_REQUEST
        case _:
            return True


def _keep_tokens_out(record: logging.LogRecord) -> bool:
    """Remove tokens, also those in an address within an address, such as `next`."""
    if isinstance(record.args, tuple):
        record.args = tuple(without_tokens(value) if isinstance(value, str) else value for value in record.args)
    return True


def without_tokens(text: str) -> str:
    """An address without the tokens that it has."""
    return _ANY_TOKEN.sub("…", _TOKEN.sub(r"\1…", text))
