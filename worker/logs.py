"""How the worker and the beat log: for a person at a terminal as Celery does, otherwise one JSON object a line."""

import logging
import sys

from pythonjsonlogger.json import JsonFormatter

_FIELDS = ["asctime", "levelname", "name", "message", "process"]
_NAMES = {"asctime": "time", "levelname": "level", "name": "logger"}


def set_up(loglevel: int | str | None = None, logfile: str | None = None, **_: object) -> None:
    """Celery's signal `setup_logging`: called instead of its own set-up, with the level and file of its flags."""
    handler = logging.FileHandler(logfile) if logfile else logging.StreamHandler()
    handler.setFormatter(JsonFormatter(_FIELDS, rename_fields=_NAMES))
    logging.basicConfig(level=loglevel or logging.WARNING, handlers=[handler], force=True)


def is_for_a_person() -> bool:
    """Whether somebody reads the log as it is written."""
    return sys.stderr.isatty()
