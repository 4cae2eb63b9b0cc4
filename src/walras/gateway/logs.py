"""Structured logs: a JSON object a line on standard error, with what happened and to what. Never a prompt, an answer or a key."""

from __future__ import annotations

import json
import logging
import sys
from datetime import UTC, datetime

_FIELDS = "walras_fields"


class _JsonLines(logging.Formatter):
    """`time`, `level`, `logger`, `event`, and whatever fields the event has; in ASCII, so that no character ends a line."""

    def format(self, record: logging.LogRecord) -> str:
        at = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
        line = {
            "time": at,
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
        }
        return json.dumps(line | getattr(record, _FIELDS, {}))


def set_up(level: str) -> None:
    """Everything of this level and above goes to standard error, the server's own complaints too."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_JsonLines())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("walras").setLevel(level.upper())


def event(logger: logging.Logger, level: int, what: str, **fields: object) -> None:
    """One event. Fields cost nothing where the level is off."""
    if logger.isEnabledFor(level):
        logger.log(level, what, extra={_FIELDS: fields})
