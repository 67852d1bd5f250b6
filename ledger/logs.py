"""The format of logs: the framework's own at a terminal, otherwise one JSON object a line."""

import logging
import os
import sys
from contextlib import suppress

from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

FORMATTER = JsonFormatter(
    ["levelname", "name", "message", "process"],
    rename_fields={"levelname": "level", "name": "logger"},
    timestamp="time",  # in UTC
    reserved_attrs=[*RESERVED_ATTRS, "color_message"],  # uvicorn's copy of the message, for a terminal
)


def are_for_a_person() -> bool:
    """Whether a person reads the log at a terminal."""
    return sys.stderr.isatty()


def set_up(loglevel: int | str | None = None, logfile: str | None = None, **_: object) -> None:
    """Log as JSON. Takes the arguments of Celery's signal `setup_logging`: the level and the file of its flags."""
    handler = logging.FileHandler(logfile) if logfile else logging.StreamHandler()
    handler.setFormatter(FORMATTER)
    logging.basicConfig(level=loglevel or logging.WARNING, handlers=[handler], force=True)


def write(message: str, *_: object) -> None:
    """Log `message` from the handler of a signal, which must not wait for a lock."""
    record = logging.LogRecord("celery", logging.INFO, "", 0, message, None, None)
    with suppress(OSError):  # nobody reads it any more
        os.write(2, f"{FORMATTER.format(record)}\n".encode())


def reformat(*names: str) -> None:
    """Make these loggers, which a framework has set up, write JSON."""
    for name in names:
        for handler in logging.getLogger(name).handlers:
            handler.setFormatter(FORMATTER)
