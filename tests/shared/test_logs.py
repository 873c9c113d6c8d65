"""The one log format: which keys a line has, and what never gets into one."""

from __future__ import annotations

import io
import json
import logging
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_shared.runtime.logs import KEYS, adopt_libraries, set_up

SECRET = "PLANTED-4711"
log = logging.getLogger("fl_client.agent")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    """Give pytest its own handlers back."""
    root = logging.getLogger()
    kept, level = list(root.handlers), root.level
    root.handlers = []
    yield
    for handler in root.handlers:
        handler.close()
    root.handlers = kept
    root.setLevel(level)
    logging.captureWarnings(False)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    """Each line as an object."""
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_the_agreed_keys_and_no_others() -> None:
    """Time, level, process, ids, part and message; an extra that is not named in FIELDS is dropped."""
    stream = io.StringIO()
    set_up("agent", site="hospital-001", stream=stream)
    log.info("training round %d", 3, extra={"run": "demo", "round": 3, "text": SECRET})
    log.warning("about another", extra={"site": "hospital-002"})
    first, second = lines(stream)
    assert [key for key in KEYS if key in first] == list(first)
    assert set(first) == {"time", "level", "process", "run", "round", "site", "part", "message"}
    assert (first["run"], first["round"], first["site"]) == ("demo", 3, "hospital-001")
    assert (first["message"], first["level"], first["part"]) == ("training round 3", "info", "fl_client.agent")
    assert first["time"].endswith("Z")
    assert (second["site"], second["level"]) == ("hospital-002", "warning")
    assert SECRET not in stream.getvalue()


@pytest.mark.parametrize("terminal", ["json", "text"])
def test_an_exception_is_its_type_and_its_places_without_its_words(terminal: str) -> None:
    """A ValueError that quotes a record shows where it arose, not what it quotes."""
    stream = io.StringIO()
    set_up("agent", terminal=terminal, stream=stream, withhold=True)
    try:
        int(f"12 {SECRET}")
    except ValueError:
        log.exception("the round failed", extra={"run": "demo", "round": 1})
    assert "ValueError" in stream.getvalue()
    assert SECRET not in stream.getvalue()
    if terminal == "json":
        (line,) = lines(stream)
        assert line["trace"][-1].startswith("test_logs.py:")
    else:
        assert "[demo round 1] ERROR: the round failed (ValueError)" in stream.getvalue()


def test_a_site_withholds_the_words_of_libraries() -> None:
    """A library's warning that quotes a text is logged as its place; the coordinator keeps the words."""
    stream = io.StringIO()
    set_up("agent", stream=stream, withhold=True)
    logging.getLogger("transformers.tokenization").warning("cannot tokenise %s", SECRET)
    logging.getLogger("transformers").info("not worth a line")
    warnings.warn(f"odd record {SECRET}", stacklevel=1)
    said, warned = lines(stream)
    assert said["part"] == "transformers.tokenization"
    assert "test_logs.py:" in said["message"]
    assert warned["part"] == "py.warnings"
    assert SECRET not in stream.getvalue()
    late = logging.getLogger("latecomer.part")  # imported after `set_up`, as transformers is
    logging.getLogger("latecomer").addHandler(logging.StreamHandler(own := io.StringIO()))
    logging.getLogger("latecomer").propagate = False
    adopt_libraries()
    late.warning("cannot tokenise %s", SECRET)
    assert lines(stream)[-1]["part"] == "latecomer.part"
    assert SECRET not in stream.getvalue() + own.getvalue()
    stream = io.StringIO()
    set_up("gateway", stream=stream)
    logging.getLogger("uvicorn.error").warning("the port is taken")
    assert lines(stream)[0]["message"] == "the port is taken"


def test_the_file_is_the_owners_and_always_json(tmp_path: Path) -> None:
    """Mode 0600, JSON lines, whatever the terminal shows; setting up again does not double the lines."""
    file = tmp_path / "logs" / "agent.jsonl"
    for _ in range(2):
        set_up("agent", file=file, terminal=None, rotate=True)
    log.info("one line")
    (line,) = file.read_text().splitlines()
    assert json.loads(line)["message"] == "one line"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
