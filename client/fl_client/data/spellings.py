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
_ROUNDED = re.compile(r"\d(?:[.,]\d+)?[eE]\+\d+")  # 1.23457E+12: a table program has cut digits off
_MISSING = frozenset(
    ("", "#n/a", "#n/an/a", "#na", "#null!", "#ref!", "#value!", "-nan", "1.#ind", "1.#qnan", "<na>", "n/a", "na",
     "nan", "nat", "none", "null")
)  # fmt: skip
_LARGEST = "9007199254740992"  # 2^53: above it a floating-point number skips whole numbers


def folded(text: str) -> str:
    """What is left of a text when case, width, blanks, invisible characters and the writing of numbers are not looked
    at: `1`, `1.0`, `1,0`, ` 001` and full-width `１` are one, `True` and `TRUE` too."""
    if text.isascii() and text.isprintable():
        kept = text.lower().replace(" ", "")
    else:
        wide = unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", text).casefold())
        kept = "".join(
            str(unicodedata.decimal(each, each))
            for each in wide
            if not each.isspace() and unicodedata.category(each) not in ("Cc", "Cf")
        )
    number = _WHOLE.fullmatch(kept)
    if number is None:
        return kept
    digits = number.group(2)
    return f"-{digits}" if number.group(1) == "-" and digits != "0" else digits


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
        key = folded(written)
        if key in _MISSING:
            raise DataError(
                f"{self._path}: row {row} has no {self._column!r}",
                fix=f"every row must say which {self._unit} it belongs to",
            )
        if _rounded(written):
            raise DataError(
                f"{self._path}: row {row} has a {self._column!r} that a table program has rounded",
                fix="export the column as text: rounded, several become one",
            )
        first, at = self._first.setdefault(key, (written, row))
        if first != written:
            raise DataError(
                f"{self._path}: rows {at} and {row} may have one {self._column!r}, written in two ways (as 1, 1.0 and "
                "001 are, or upper and lower case)",
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


def run_labels(found: Sequence[str], labels: Sequence[str]) -> tuple[str | None, ...]:
    """For each label of the data the run's public label that it means, None when there is none.

    The very same text comes first; else the run's label that is the same when `folded`, if there is exactly one.
    """
    meant: dict[str, str | None] = {}
    for label in labels:
        key = folded(label)
        meant[key] = None if key in meant else label
    exact = set(labels)
    known = {label: label if label in exact else meant.get(folded(label)) for label in set(found)}
    return tuple(known[label] for label in found)
