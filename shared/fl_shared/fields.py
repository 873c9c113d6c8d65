"""Strict reading of TOML and JSON: every wrong field is named with its value and the fix."""

from __future__ import annotations

import difflib
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

from fl_shared.errors import ConcordatError, ConfigError, shown

T = TypeVar("T")
_MAX_BYTES = 1 << 20
MAX_KEYS, MAX_PARTS, MAX_DEPTH = 2000, 16, 32
# What holds text in TOML 1.0: multi-line strings (up to two quotes may stand before the closing three), strings,
# comments. Possessive, and what is not closed goes to its end, so that no text makes the search go back.
_TEXT = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5}|\Z)|\'{3}(?:[^']|'(?!''))*+(?:'{3,5}|\Z)'''
    r"""|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
_DOTS = re.compile(r"(?<![\w\-])(?:[\w\-]++[ \t]*+\.[ \t]*+){16}")  # MAX_PARTS
_TABLE = re.compile(r"^[ \t]*+\[", re.MULTILINE)
_MISSING: Any = object()


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of at most 1 MiB; ConfigError names the file and the line."""
    try:
        with path.open("rb") as source:
            data = source.read(_MAX_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", fix="check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", fix="save the file as UTF-8") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML text of at most 1 MiB; ConfigError names `where` and the line."""
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{where} is larger than 1 MiB", fix="a configuration is a small file")
    _require_modest(text, where)
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))  # a byte order mark, as Windows editors write it
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, endless nesting
        raise ConfigError(f"{where}: {error}", fix="mend the TOML at that place") from error


def _require_modest(text: str, where: str) -> None:
    """ConfigError for a structure that no configuration has: tomllib's work grows with keys times their parts.

    One pass over the text, without a parser: strings and comments are blanked out, the rest is counted. Up to the
    first place that is no TOML, where tomllib stops, this reads the text as tomllib does.
    """
    bare = _TEXT.sub("t", text)
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    keys = bare.count("=") + len(_TABLE.findall(bare))
    for what, much in (
        (f"has more than {MAX_KEYS} keys and tables", keys > MAX_KEYS),
        (f"has a key of more than {MAX_PARTS} parts", _DOTS.search(bare) is not None),
        (f"is nested deeper than {MAX_DEPTH} levels", deepest > MAX_DEPTH),
    ):
        if much:
            raise ConfigError(f"{where} {what}", fix="write the few tables that the documentation shows")


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


class Fields:
    """One table of a configuration, read field by field; `done()` refuses what was not asked for.

    Args:
        table: the parsed table.
        where: how errors call it, for example `site.toml [policy]`.
        base: the folder that relative paths start from.
    """

    def __init__(self, table: Any, where: str, *, base: Path | None = None) -> None:
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where} is {shown(table)}, not a table", fix=f"write {where} as a table of fields")
        if len(table) > MAX_KEYS:
            raise ConfigError(f"{where} has {len(table)} fields", fix="write the few that the documentation shows")
        self._table = dict(table)
        self._where = where
        self._base = base
        self._asked: set[str] = set()

    def fail(self, name: str, problem: str, fix: str) -> ConfigError:
        """The error for one field; the caller raises it."""
        return ConfigError(f"{self._where}: {name} {problem}", fix=fix)

    def _take(self, name: str, default: Any, fix: str) -> Any:
        self._asked.add(name)
        if name in self._table:
            return self._table[name]
        if default is _MISSING:
            near = difflib.get_close_matches(name, {str(key) for key in self._table} - self._asked, n=1)
            hint = f"; did you mean it by {near[0]!r}?" if near else ""
            raise self.fail(name, f"is missing{hint}", f"add {name}: {fix}")
        return default

    def section(self, name: str, *, optional: bool = False) -> Fields:
        """A nested table; with `optional`, an empty one when it is absent."""
        self._asked.add(name)
        value = {} if optional and name not in self._table else self._take(name, _MISSING, "a table")
        return Fields(value, f"{self._where} [{name}]", base=self._base)

    def text(self, name: str, *, default: Any = _MISSING, empty: bool = False) -> str:
        """A text of at most 4096 characters."""
        value = self._take(name, default, "a text in quotes")
        if value is default and default is not _MISSING:
            return value  # type: ignore[no-any-return]  # the caller's own default
        if not _is_text(value) or (not value and not empty) or len(value) > 4096:
            raise self.fail(name, f"is {shown(value)}", "write a text in quotes")
        return value

    def named(self, name: str, check: Callable[[object], T]) -> T:
        """A field that `check` accepts (it raises a ConcordatError otherwise)."""
        value = self._take(name, _MISSING, "a name")
        try:
            return check(value)
        except ConcordatError as error:
            raise self.fail(name, f"is {shown(value)}: {error.message}", error.fix) from error

    def boolean(self, name: str, *, default: Any = _MISSING) -> bool:
        """true or false."""
        value = self._take(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.fail(name, f"is {shown(value)}", "write true or false")
        return value

    def integer(self, name: str, *, low: int, high: int, default: Any = _MISSING) -> int:
        """A whole number in [low, high]."""
        value = self._take(name, default, f"a whole number from {low} to {high}")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(name, f"is {shown(value)}", f"write a whole number from {low} to {high}")
        return value

    def number(
        self,
        name: str,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        above: bool = False,
        below: bool = False,
        default: Any = _MISSING,
    ) -> float:
        """A finite number between low and high; `above`/`below` exclude the ends."""
        bounds = f"{'above' if above else 'from'} {low:g} {'and below' if below else 'to'} {high:g}"
        value = self._take(name, default, f"a number {bounds}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"is {shown(value)}", f"write a number {bounds}")
        if isinstance(value, int) and abs(value) > 1 << 64:  # beyond what a float takes, comparing would raise
            raise self.fail(name, f"is {shown(value)}", f"write a number {bounds}")
        if (
            not math.isfinite(value)
            or value < low
            or value > high
            or (above and value == low)
            or (below and value == high)
        ):
            raise self.fail(name, f"is {shown(value)}", f"write a number {bounds}")
        return float(value)

    def choice(self, name: str, options: Sequence[str], *, default: Any = _MISSING) -> str:
        """One of the options."""
        value = self._take(name, default, f"one of {', '.join(options)}")
        if value not in options:
            near = difflib.get_close_matches(str(value)[:200], options, n=1) if isinstance(value, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise self.fail(name, f"is {shown(value)}{hint}", f"write one of {', '.join(options)}")
        return str(value)

    def texts(self, name: str, *, low: int = 1, high: int = 10_000, default: Any = _MISSING) -> tuple[str, ...]:
        """A list of different, non-empty texts."""
        value = self._take(name, default, "a list of texts")
        if (
            not isinstance(value, list | tuple)
            or not low <= len(value) <= high
            or not all(_is_text(each) and 0 < len(each) <= 512 for each in value)
        ):
            raise self.fail(name, f"is {shown(value)}", f"write a list of {low} to {high} texts")
        if len(set(value)) != len(value):
            (twice, _), *_ = Counter(value).most_common(1)
            raise self.fail(name, f"names {shown(twice)} twice", "name each once")
        return tuple(value)

    def path(self, name: str, *, default: Any = _MISSING) -> Path:
        """A path; `~` is expanded and a relative one starts at the file's folder."""
        value = self._take(name, default, "a path in quotes")
        if not isinstance(value, str | Path) or not str(value) or not _is_text(str(value)):
            raise self.fail(name, f"is {shown(value)}", "write a path in quotes")
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            raise self.fail(name, f"is {shown(value)}", "name a user that exists after ~") from None
        return path if path.is_absolute() or self._base is None else self._base / path

    def table(self, name: str) -> dict[str, Any]:
        """A nested table as it stands."""
        value = self._take(name, _MISSING, "a table")
        if not isinstance(value, dict):
            raise self.fail(name, f"is {shown(value)}", "write a table")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is given."""
        return name in self._table

    def done(self) -> None:
        """Refuse fields that nobody asked for, with the nearest known name."""
        for name in self._table:
            if name not in self._asked:
                raise self.fail(str(name)[:80], "is not a field here", self._nearest(str(name)))

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name[:200], self._asked, n=1)
        return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(self._asked))}"
