"""One log format for every process of coordinator and site: JSON lines, or short lines for a person.

A JSON line holds the names in `KEYS` and no others, so a value reaches a log only through a message that our
own code words, or through a field that is named here. An exception is logged as its type and the places in the
code that it passed; its message may quote data and stays out. At a site the words of libraries are withheld
for the same reason: who spoke and where is kept.

`set_up` needs structlog (extras `server` and `client`), which the auditor's install has not.
"""

from __future__ import annotations

import datetime as dt
import logging
import logging.handlers
import os
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

if TYPE_CHECKING:
    from structlog.typing import EventDict, Processor, WrappedLogger

from fl_shared.runtime.private_files import create_file

FORMATS = ("text", "json")
FORMAT_VARIABLE = "FL_LOG_FORMAT"
FIELDS = ("run", "round", "site", "code", "entry", "digest", "kind")
KEYS = ("time", "level", "process", *FIELDS, "part", "message", "error", "trace")
_OWN = ("fl_shared", "fl_server", "fl_client", "__main__")
_FRAMES = 6
_FILE_BYTES, _FILES = 16 << 20, 4


def default_format() -> str:
    """`$FL_LOG_FORMAT` when it names a format, `text` otherwise."""
    chosen = os.environ.get(FORMAT_VARIABLE, "")
    return chosen if chosen in FORMATS else "text"


def set_up(
    process: str,
    *,
    site: str = "",
    file: Path | None = None,
    terminal: str | None = "json",
    stream: TextIO | None = None,
    withhold: bool = False,
    rotate: bool = False,
) -> None:
    """Send all logging of this process to `file` as JSON lines and to `stream` in the format `terminal`.

    Args:
        process: the name of this process in every line, e.g. `gateway`.
        site: the site's id for every line that names no other.
        file: appended to, mode 0600; None for none.
        terminal: `text`, `json`, or None for silence.
        stream: standard error unless given.
        withhold: keep the words of libraries out; True at a site.
        rotate: replace the file at 16 MiB, keeping four; only where this process alone writes it.
    """
    always = {"process": process, **({"site": site} if site else {})}
    root = logging.getLogger()
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.setLevel(logging.WARNING)
    for name in _OWN:
        logging.getLogger(name).setLevel(logging.INFO)
    logging.captureWarnings(True)
    if withhold:
        adopt_libraries()
    if terminal is not None:
        stream_handler = logging.StreamHandler(stream or sys.stderr)
        stream_handler.setFormatter(_formatter(always, terminal, withhold=withhold))
        root.addHandler(stream_handler)
    if file is not None:
        root.addHandler(_file_handler(file, _formatter(always, "json", withhold=withhold), rotate=rotate))


def adopt_libraries() -> None:
    """Take from libraries the handlers that they gave themselves (transformers and torch do), so that their words go
    the way of everybody's. Called again once such a library has been imported.
    """
    for name, logger in list(logging.root.manager.loggerDict.items()):
        if isinstance(logger, logging.Logger) and name.partition(".")[0] not in _OWN:
            logger.handlers.clear()
            logger.propagate = True


def _file_handler(file: Path, formatter: logging.Formatter, *, rotate: bool) -> logging.Handler:
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    create_file(file)
    handler: logging.FileHandler
    if rotate:
        handler = logging.handlers.RotatingFileHandler(file, maxBytes=_FILE_BYTES, backupCount=_FILES, encoding="utf-8")
    else:
        handler = logging.handlers.WatchedFileHandler(file, encoding="utf-8")  # notices that logrotate moved it
    file.chmod(0o600)
    handler.setFormatter(formatter)
    return handler


def _formatter(always: dict[str, str], form: str, *, withhold: bool) -> logging.Formatter:
    import structlog

    def add_always(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
        return {**always, **event}

    before: list[Processor] = [
        structlog.stdlib.add_log_level,
        structlog.stdlib.add_logger_name,
        structlog.stdlib.ExtraAdder(allow=FIELDS),
        structlog.processors.TimeStamper(fmt="iso", utc=True, key="time"),
        add_always,
        *([_withhold] if withhold else []),
        _name_error,
    ]
    renderer: Processor = structlog.processors.JSONRenderer(ensure_ascii=False) if form == "json" else _one_line
    return structlog.stdlib.ProcessorFormatter(foreign_pre_chain=before, processors=[_arrange, renderer])


def _withhold(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """Replace what a library says by the place in its code."""
    record: logging.LogRecord = event["_record"]
    if record.name.partition(".")[0] not in _OWN:
        event["event"] = f"a library's message is withheld ({Path(record.pathname).name}:{record.lineno})"
    return event


def _name_error(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The type of an exception and the innermost places that it passed, without its message."""
    caught = event.pop("exc_info", None)
    if isinstance(caught, tuple) and caught[0] is not None:
        frames = traceback.extract_tb(caught[2])[-_FRAMES:]
        event["error"] = caught[0].__name__
        event["trace"] = [f"{Path(frame.filename).name}:{frame.lineno} {frame.name}" for frame in frames]
    return event


def _arrange(_logger: WrappedLogger, _method: str, event: EventDict) -> EventDict:
    """The keys that a line may have, always in the same order."""
    event["message"], event["part"] = event.pop("event"), event.pop("logger", "")
    return {key: event[key] for key in KEYS if key in event}


def _one_line(_logger: WrappedLogger, _method: str, event: EventDict) -> str:
    """Time, the round if any, and the message, for a person at a terminal."""
    clock = dt.datetime.fromisoformat(event["time"]).astimezone().strftime("%H:%M:%S")
    where = f" [{event['run']} round {event['round']}]" if event.get("run") and event.get("round") else ""
    mark = "" if event["level"] in ("debug", "info") else f" {event['level'].upper()}:"
    error = f" ({event['error']})" if "error" in event else ""
    return f"{clock}{where}{mark} {event['message']}{error}"
