"""Reading of TOML files and texts that no text can make expensive: the file and the line of a fault are named."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

from fl_shared.errors import ConfigError

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
        raise ConfigError(f"{where}: {error}", fix="fix the TOML at that place") from error


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
    for problem, much in (
        (f"has more than {MAX_KEYS} keys and tables", keys > MAX_KEYS),
        (f"has a key of more than {MAX_PARTS} parts", _DOTS.search(bare) is not None),
        (f"is nested deeper than {MAX_DEPTH} levels", deepest > MAX_DEPTH),
    ):
        if much:
            raise ConfigError(f"{where} {problem}", fix="write the few tables that the documentation shows")
