"""How every command prints: tables that can be read by eye and by `awk`, commands that paste back, signs of life.

Into a pipe or a file a table is plain columns, one line a row, as wide as its words are: nothing is folded, cut or
drawn. On a terminal words fold within their column, but never inside a word (an id, a digest, the name of a site).
What tells of progress goes to standard error alone.
"""

from __future__ import annotations

import contextlib
import csv
import itertools
import json as json_text
import os
import shlex
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol, TextIO

from rich.console import Console
from rich.live import Live
from rich.spinner import Spinner
from rich.text import Text

from fl_shared.errors import printable

GAP = 2
PATIENCE_S = 2.0
"""What takes no longer than this is done in silence."""
REPEAT_S = 15.0
"""How often a line says, into a pipe, that something still goes on."""


def on(stream: TextIO) -> Console:
    """A console on `stream` that draws with colours only on a terminal that wants them."""
    colours: Literal["auto"] | None = None if os.environ.get("NO_COLOR") else "auto"
    return Console(file=stream, highlight=False, markup=False, emoji=False, color_system=colours)


def table(columns: Sequence[str], rows: Iterable[Sequence[str]], *, title: str = "", right: Sequence[str] = ()) -> None:
    """Print a table; the columns named in `right` hold numbers. Text that came over a network steers no terminal."""
    terminal = sys.stdout.isatty()
    cells = [[printable(cell).expandtabs().strip().split("\n") for cell in row] for row in rows]
    if not terminal:
        cells = [[["; ".join(line.strip() for line in cell)] for cell in row] for row in cells]
    widths = [max([len(name), *(len(line) for row in cells for line in row[at])]) for at, name in enumerate(columns)]
    if terminal:
        _narrow(widths, columns, cells, shutil.get_terminal_size().columns)
    if title:
        print(printable(title))
    _row([[name] for name in columns], columns, widths, right)
    for row in cells:
        folded = [[part for line in cell for part in _folded(line, widths[at])] for at, cell in enumerate(row)]
        _row(folded, columns, widths, right)


def _narrow(widths: list[int], columns: Sequence[str], cells: Sequence[Sequence[Sequence[str]]], room: int) -> None:
    """Take width from the columns that have the most to give until a row fits; no word is ever broken."""
    words = [
        max([len(name), *(len(word) for row in cells for line in row[at] for word in line.split())])
        for at, name in enumerate(columns)
    ]
    gaps = GAP * (len(widths) - 1)
    if sum(words) + gaps > room:
        return  # it cannot fit: the terminal breaks the line where it likes, and nothing is lost
    for _ in range(sum(widths) + gaps - room):
        at = max(range(len(widths)), key=lambda n: widths[n] - words[n])
        widths[at] -= 1


def _folded(line: str, width: int) -> list[str]:
    if len(line) <= width:
        return [line]
    return textwrap.wrap(line, width, break_long_words=False, break_on_hyphens=False)


def _row(cells: Sequence[Sequence[str]], columns: Sequence[str], widths: Sequence[int], right: Sequence[str]) -> None:
    for lines in itertools.zip_longest(*cells, fillvalue=""):
        placed = (
            line.rjust(width) if name in right else line.ljust(width)
            for line, name, width in zip(lines, columns, widths, strict=True)
        )
        print((" " * GAP).join(placed).rstrip())


def facts(rows: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair a line."""
    pairs = [(name, printable(value)) for name, value in rows]
    width = max((len(name) for name, _ in pairs), default=0)
    for name, value in pairs:
        print(f"{name:<{width}}  {value}".rstrip())


def print_json(document: Any) -> None:
    """Print one JSON document; NaN and infinity are none."""
    text = json_text.dumps(document, indent=2, ensure_ascii=False, allow_nan=False)
    print(text.encode("utf-8", "backslashreplace").decode())  # half a surrogate pair, in evidence from elsewhere


def print_csv(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print rows with a header line; nested tables become `outer.inner` columns."""
    flat = [_flat(row) for row in rows]
    columns = list(dict.fromkeys(name for row in flat for name in row))
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)


def _flat(row: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, Mapping):
            values |= {f"{name}.{inner}": item for inner, item in _flat(value).items()}
        elif isinstance(value, str) and value[:1] in {"=", "+", "-", "@", "\t", "\r"}:
            values[name] = f"'{value}"  # a spreadsheet would run it as a formula
        else:
            values[name] = value
    return values


def command(*words: str | Path) -> str:
    """A command as a person can paste it back into a shell, whatever its paths and names hold."""
    return shlex.join(map(str, words))


class Say(Protocol):
    """Tells what is being done now, and how much of it is done."""

    def __call__(self, activity: str, done: int = 0, total: int = 0) -> None:
        """`activity` is being done; `done` of `total` parts are, when there are parts."""


def silent(activity: str, done: int = 0, total: int = 0) -> None:
    """Say nothing."""


@contextlib.contextmanager
def working(activity: str, *, quiet: bool = False, json: bool = False) -> Iterator[Say]:
    """Show on standard error what is being done while the body runs, once it has taken `PATIENCE_S`.

    On a terminal one line that changes and is gone at the end; otherwise a line for each thing that is done, and one
    every `REPEAT_S`. With `quiet` nothing; with `json` nothing into a pipe, where an error is to be one JSON object.
    """
    terminal = sys.stderr.isatty() and not on(sys.stderr).is_dumb_terminal
    if quiet or (json and not terminal):
        yield silent
        return
    progress = _Line(activity) if terminal else _Lines(activity)
    ended = threading.Event()
    ticking = threading.Thread(target=_tick, args=(progress, ended), name="progress", daemon=True)
    ticking.start()
    try:
        yield progress.say
    finally:
        ended.set()
        ticking.join()
        progress.close()


def _tick(progress: _Lines | _Line, ended: threading.Event) -> None:
    if ended.wait(PATIENCE_S):
        return
    while True:
        progress.show()
        if ended.wait(progress.every_s):
            return


class _Lines:
    """Progress for a pipe or a file: whole lines."""

    every_s = 1.0

    def __init__(self, activity: str) -> None:
        self._activity, self._done, self._total = activity, 0, 0
        self._begun = time.monotonic()
        self._shown, self._shown_at = "", 0.0

    def say(self, activity: str, done: int = 0, total: int = 0) -> None:
        """Take note; the ticking thread shows it."""
        self._activity, self._done, self._total = activity, done, total

    def _text(self) -> str:
        share = f" {100 * self._done // self._total} %" if self._total else ""
        return printable(f"{self._activity}{share} ({time.monotonic() - self._begun:.0f} s)").replace("\n", " ")

    def show(self) -> None:
        """One line, when what is done has changed or nothing was said for a while."""
        now = time.monotonic()
        if self._activity != self._shown or now - self._shown_at >= REPEAT_S:
            self._shown, self._shown_at = self._activity, now
            with contextlib.suppress(OSError, ValueError):  # nobody reads it any more; the work goes on
                print(self._text(), file=sys.stderr, flush=True)

    def close(self) -> None:
        """Nothing to take away."""


class _Line(_Lines):
    """Progress for a terminal: one line that changes."""

    every_s = 0.2

    def __init__(self, activity: str) -> None:
        super().__init__(activity)
        self._spinner = Spinner("dots", Text(activity))
        # Standard output is not ours to redirect: it may be a file.
        self._live = Live(self._spinner, console=on(sys.stderr), transient=True, redirect_stdout=False)

    def show(self) -> None:
        """Bring the line up to date."""
        self._spinner.update(text=Text(self._text()))
        self._live.start()  # does nothing when it has been started

    def close(self) -> None:
        """Take the line away."""
        self._live.stop()
