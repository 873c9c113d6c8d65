"""Logs of a site: JSON lines in `HOME/logs`, one short line each on standard output, no private value.

Records carry `run` and `round` where they belong to one. Nothing that was computed from private data is
ever passed to a logger: no text, no label, no count of records, no loss.
"""

from __future__ import annotations

import datetime as dt
import json
import logging
import logging.handlers
import sys
from pathlib import Path
from typing import Any

_FIELDS = ("run", "round", "code", "entry", "digest")


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, part, message, and the fields of the record."""

    def __init__(self, site: str) -> None:
        """Remember the site's id; it stands in every line."""
        super().__init__()
        self._site = site

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        line: dict[str, Any] = {
            "time": dt.datetime.fromtimestamp(record.created, dt.UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "site": self._site,
            "part": record.name,
            "message": record.getMessage(),
        }
        line.update({name: getattr(record, name) for name in _FIELDS if hasattr(record, name)})
        if record.exc_info and record.exc_info[0] is not None:
            line["error"] = record.exc_info[0].__name__  # the type alone: a message may quote data
        return json.dumps(line, ensure_ascii=False)


class OneLine(logging.Formatter):
    """Time, the round if any, and the message, for a person at a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, without its end."""
        clock = dt.datetime.fromtimestamp(record.created).astimezone().strftime("%H:%M:%S")
        where = (
            f" [{record.run} round {record.round}]"
            if hasattr(record, "run") and hasattr(record, "round")
            else ""
        )
        mark = "" if record.levelno <= logging.INFO else f" {record.levelname}:"
        return f"{clock}{where}{mark} {record.getMessage()}"


def set_up(directory: Path, site: str, name: str, *, quiet: bool = False) -> None:
    """Send the log of this process to `directory/NAME.jsonl` and, unless `quiet`, to standard output."""
    root = logging.getLogger("fl_client")
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.INFO)
    root.propagate = False
    lines = logging.handlers.RotatingFileHandler(
        directory / f"{name}.jsonl", maxBytes=16 << 20, backupCount=4, encoding="utf-8"
    )
    Path(lines.baseFilename).chmod(0o600)
    lines.setFormatter(JsonLines(site))
    root.addHandler(lines)
    if not quiet:
        terminal = logging.StreamHandler(sys.stdout)
        terminal.setFormatter(OneLine())
        root.addHandler(terminal)
