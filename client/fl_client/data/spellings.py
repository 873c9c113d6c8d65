"""Ids and labels that table programs write in several ways: which are one and the same, and which cannot be told.

A label is compared with the run's public ones, so a mistake leaves a record out. An id decides whose rows are protected
together: one patient under two ids would be two privacy units, and two patients under one id would stand in for each
other. So ids are never merged by guess; two that may be one are refused (docs/decisions/0094).
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path

from fl_shared.errors import DataError

_WHOLE = re.compile(r"([+-]?)0*(\d+)([.,]0*)?")
_NUMBER = re.compile(r"([+-]?)(\d+)(?:[.,](\d*))?(?:e([+-]?\d{1,4}))?")
_ROUNDED = re.compile(r"\d(?:[.,]\d+)?[eE]\+\d+")  # 1.23457E+12: a table program has cut digits off
_GROUPED = re.compile(r"[+-]?\d{1,3}(?:[.,'’]\d{3})+")  # 1.234 and 1,234: in thousands, in some countries
_PADDING = re.compile(r"(?<![\d.,])0+(?=\d)")
_BEFORE, _AFTER = "='\"‘’`<{([", "'\"‘’`>})]"  # '001, ="001", {1}: how a number is kept text
_MISSING = frozenset(
    ("-nan", "1.#ind", "1.#inf", "1.#qnan", "\\n", "blank", "empty", "inf", "infinity", "-inf", "-infinity",
     "missing", "n/a", "na", "nan", "nat", "nil", "nodata", "none", "notapplicable", "notavailable", "null",
     "undefined", "unknown")
)  # fmt: skip
_SHEET_ERROR = re.compile(r"#(?:n/?a.*|[a-z_]+(?:/0)?[!?])")  # #N/A, #DIV/0!, #NAME?
_LARGEST = "9007199254740992"  # 2^53: above it a floating-point number skips whole numbers


def folded(text: str) -> str:
    """What is left of a text when case, width, blanks, invisible characters and the writing of numbers are not looked
    at: `1`, `1.0`, `1,0`, ` 001` and full-width `１` are one, `True` and `TRUE` too."""
    return _number(_plain(text))


def _plain(text: str) -> str:
    if text.isascii() and text.isprintable():
        return text.lower().replace(" ", "")
    wide = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
    return "".join(
        str(unicodedata.decimal(character, character))
        for character in wide
        if not character.isspace() and unicodedata.category(character) not in ("Cc", "Cf")
    )


def _number(plain: str) -> str:
    """One text for a number however it is written, of any length; any other text as it is."""
    number = _NUMBER.fullmatch(plain)
    if number is None:
        return plain
    sign, whole, fraction, exponent = number.groups(default="")
    digits = f"{whole}{fraction}".lstrip("0")
    bare = digits.rstrip("0")
    places = int(exponent or 0) - len(fraction) + len(digits) - len(bare)
    return f"{'-' if sign == '-' else ''}{bare}e{places}" if bare else "0"


def lookalikes(text: str) -> tuple[str, ...]:
    """What an id may be the same as: `folded`, less what programs and people put about a number.

    `'001`, `="001"` and `{1}` are `1`; `P01` is `P1`; `1.234` is 1.234 and 1234.
    """
    bare = _plain(text).lstrip(_BEFORE).rstrip(_AFTER)
    key = _PADDING.sub("", _number(bare))
    return (key, _number(re.sub(r"[.,'’]", "", bare))) if _GROUPED.fullmatch(bare) else (key,)


class UnitIds:
    """The ids of one table's units. `path`, `column` and `unit` are for messages, which never quote an id."""

    def __init__(self, path: Path, column: str, unit: str) -> None:
        """No id has been seen yet."""
        self._path, self._column, self._unit = path, column, unit
        self._first: dict[str, tuple[str, int]] = {}

    def checked(self, text: str, row: int) -> str:
        """The id that row `row` has; DataError when it is missing, rounded, or may be an earlier one written
        otherwise."""
        written = text.strip()
        keys = lookalikes(written)
        if (
            keys[0] in _MISSING
            or _SHEET_ERROR.fullmatch(keys[0])
            or not any(character.isalnum() for character in keys[0])
        ):
            raise DataError(
                f"{self._path}: row {row} has no {self._column!r}",
                fix=f"every row must say which {self._unit} it belongs to",
            )
        if _rounded(written):
            raise DataError(
                f"{self._path}: row {row} has a {self._column!r} that a table program has rounded",
                fix="export the column as text: rounded, several become one",
            )
        for key in keys:
            first, at = self._first.setdefault(key, (written, row))
            if first != written:
                raise DataError(
                    f"{self._path}: rows {at} and {row} may have one {self._column!r}, written in two ways (as 1, 1.0 "
                    "and 001 are, or upper and lower case)",
                    fix=f"write each {self._unit}'s id in one way, and those of two in ways that differ in more",
                )
        return written


def _rounded(written: str) -> bool:
    """Whether the id is a floating-point number of more digits than those hold."""
    if _ROUNDED.fullmatch(written):
        return True
    number = _WHOLE.fullmatch(written)
    if number is None or number.group(3) is None:
        return False
    return (len(number.group(2)), number.group(2)) >= (len(_LARGEST), _LARGEST)


def run_labels(cells: Sequence[str], labels: Sequence[str]) -> tuple[str | None, ...]:
    """For each label of the data the run's public label that it means, None when there is none.

    The very same text comes first; else the run's label that is the same when `folded`, if there is exactly one.
    """
    meant: dict[str, str | None] = {}
    for label in labels:
        key = folded(label)
        meant[key] = None if key in meant else label
    exact = set(labels)
    known = {label: label if label in exact else meant.get(folded(label)) for label in set(cells)}
    return tuple(known[label] for label in cells)
