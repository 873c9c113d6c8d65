"""The hospital split: whole categories on one side, the same for ever, nothing held out in public text."""

from __future__ import annotations

import importlib
from collections import Counter
from types import ModuleType

import pytest

from fl_client.data.icd10 import category_of, chapter_titles, hospital_split, is_held_out, public_descriptions

SIDES = {
    "A00": True,
    "C34": False,
    "E11": False,
    "I21": False,
    "J45": False,
    "S72": True,
    "U07": False,
    "Z99": False,
}


@pytest.fixture(scope="module")
def icd() -> ModuleType:
    """The terminology's package; its import takes seconds."""
    return importlib.import_module("simple_icd_10_cm")


def _categories_by_term(icd: ModuleType) -> dict[str, set[str]]:
    """Inclusion term -> every category it stands under, read from the package itself."""
    found: dict[str, set[str]] = {}
    for code in icd.get_all_codes(True):
        if icd.is_category(code) or icd.is_subcategory(code):
            for term in icd.get_inclusion_term(code):
                found.setdefault(term.strip(), set()).add(code[:3])
    return found


def test_no_category_has_rows_on_both_sides(icd: ModuleType) -> None:
    """A held-out text stands under held-out categories only, a training text under a training one."""
    train, test = hospital_split()
    categories = _categories_by_term(icd)
    assert all(all(is_held_out(c) for c in categories[text]) for text, _ in test)
    assert all(any(not is_held_out(c) for c in categories[text]) for text, _ in train)
    assert not {text for text, _ in train} & {text for text, _ in test}
    assert len(train) == len(dict(train))
    assert len(test) == len(dict(test))


def test_the_split_keeps_its_size_and_every_chapter() -> None:
    """About a fifth is held out, from every chapter but the tiny "special purposes"; no class dominates."""
    train, test = hospital_split()
    assert 0.15 < len(test) / (len(train) + len(test)) < 0.25
    assert {label for _, label in train} == set(chapter_titles())
    assert {label for _, label in test} == set(chapter_titles()) - {"22"}
    majority = max(Counter(label for _, label in test).values()) / len(test)
    assert 0.05 < majority < 0.15


def test_the_split_is_pinned() -> None:
    """A category's side depends on its name alone; these were written down once."""
    assert {name: is_held_out(name) for name in SIDES} == SIDES
    assert category_of("S72.001A") == "S72"


def test_labels_are_the_chapters_of_the_classification(icd: ModuleType) -> None:
    """A row's label is the chapter that ICD-10-CM puts its term under."""
    train, _ = hospital_split()
    rows = dict(train)
    terms = icd.get_inclusion_term("A01.0")
    assert terms
    assert {rows[term] for term in terms} == {"1"}
    assert chapter_titles()["9"].lower() == "diseases of the circulatory system"


def test_public_text_holds_no_inclusion_term_row_and_no_held_out_category(icd: ModuleType) -> None:
    """What the base may be pretrained on: descriptions under training categories, none under a held-out one."""
    public = public_descriptions()
    allowed = Counter(
        icd.get_description(code)
        for code in icd.get_all_codes(True)
        if (icd.is_category(code) or icd.is_subcategory(code)) and not is_held_out(code[:3])
    )
    assert Counter(text for text, _ in public) == allowed
    # A block may be called like its first category: Glaucoma (H40-H42) and Glaucoma (H40).
    codes = icd.get_all_codes(True)
    blocks = {icd.get_description(code).rsplit(" (", 1)[0] for code in codes if icd.is_block(code)}
    held_out_titles = {icd.get_description(c) for c in codes if icd.is_category(c) and is_held_out(c)} - blocks
    assert len(held_out_titles) > 300
    assert not held_out_titles & {title for _, parents in public for title in parents}
