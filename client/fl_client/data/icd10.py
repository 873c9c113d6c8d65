"""The hospital scenario's data: ICD-10 inclusion terms and their chapters, split by 3-character category.

The source is the package `simple-icd-10-cm` (ICD-10-CM, public domain terminology, not patient records). A random
split would leak siblings of a category into the held-out set; here a whole category is on one side or the other.
"""

from __future__ import annotations

import hashlib
import importlib
from functools import cache
from types import ModuleType

HELD_OUT_SHARE = 0.2


def category_of(code: str) -> str:
    """The 3-character category of a code below chapter and block level, for example `A00` of `A00.1`."""
    return code.split(".")[0]


def is_held_out(category: str) -> bool:
    """Whether a 3-character category belongs to the held-out fifth: decided by its SHA-256, for ever the same."""
    first = int.from_bytes(hashlib.sha256(f"concordat/hospital/{category}".encode()).digest()[:8])
    return first / 2**64 < HELD_OUT_SHARE


@cache
def _icd() -> ModuleType:
    """The package: its import reads all of its XML, which takes seconds that only who needs it has to spend."""
    return importlib.import_module("simple_icd_10_cm")


@cache
def _coded() -> tuple[str, ...]:
    return tuple(c for c in _icd().get_all_codes(True) if _icd().is_category(c) or _icd().is_subcategory(c))


@cache
def chapter_of(code: str) -> str:
    """The chapter's number, `1` to `22`."""
    return str(_icd().get_ancestors(code)[-1])


def chapter_titles() -> dict[str, str]:
    """Chapter number to its title, without the code range."""
    chapters = [c for c in _icd().get_all_codes(True) if _icd().is_chapter(c)]
    return {c: _icd().get_description(c).rsplit(" (", 1)[0] for c in chapters}


def hospital_split() -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """(training rows, held-out rows), each row (inclusion term, chapter number), in the classification's order.

    A text that occurs more than once is kept once; a text on both sides is kept on the training side only.
    """
    train: dict[str, str] = {}
    test: dict[str, str] = {}
    for code in _coded():
        side = test if is_held_out(category_of(code)) else train
        for term in _icd().get_inclusion_term(code):
            side.setdefault(term.strip(), chapter_of(code))
    return list(train.items()), [(term, chapter) for term, chapter in test.items() if term not in train]


def public_descriptions() -> list[tuple[str, tuple[str, ...]]]:
    """(description, titles of its ancestors from category up to chapter) for categories that are not held out.

    What the base model may be pretrained on: no inclusion term, and nothing of a held-out category.
    """
    rows = []
    for code in _coded():
        if not is_held_out(category_of(code)):
            parents = tuple(_icd().get_description(parent).rsplit(" (", 1)[0] for parent in _icd().get_ancestors(code))
            rows.append((_icd().get_description(code), parents))
    return rows
