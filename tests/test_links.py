"""Every link in every Markdown file leads to a file, and to a heading of it; every document can be reached."""

from __future__ import annotations

import functools
import re
from pathlib import Path

import pytest

from helpers import index

ROOT = index.ROOT
MARKDOWN = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part.startswith(".") or part in ("out", "dist", "build") for part in path.relative_to(ROOT).parts)
)
LINK = re.compile(r"(?<!!)\[[^]\n]*(?:\n[^]\n]*)?\]\(([^)\s]+)\)")
CODE = re.compile(r"^```.*?^```$|`[^`\n]*`", re.DOTALL | re.MULTILINE)


def links(document: Path) -> list[str]:
    """The targets of a document's links outside code; `](` within a name of a link's text is no link."""
    return LINK.findall(CODE.sub("x", document.read_text("utf-8")))


@functools.cache
def anchors(document: Path) -> frozenset[str]:
    """The anchors of a document's headings, as GitHub makes them: lower case, blanks as hyphens, no punctuation."""
    text = re.sub(r"^```.*?^```$", "", document.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    found: list[str] = []
    for title in re.findall(r"^#{1,6} +(.+?) *$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found.append(slug if slug not in found else f"{slug}-{found.count(slug)}")
    return frozenset(found)


def problem_with(document: Path, target: str) -> str:
    """What is wrong with a link; "" when it leads somewhere. Addresses of the web are not visited."""
    if re.match(r"[a-z]+:", target):
        return "" if target.startswith("https://") else "not https"
    path, _, anchor = target.partition("#")
    place = (document.parent / path).resolve() if path else document
    if not place.is_relative_to(ROOT) or not place.exists():
        return "no such file"
    if anchor and anchor not in anchors(place):
        return f"no such heading; there are {', '.join(sorted(anchors(place)))}"
    return ""


@pytest.mark.parametrize("document", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(document: Path) -> None:
    """Relative links; those with # to a heading that is there."""
    wrong = {target: problem_with(document, target) for target in links(document)}
    assert {target: why for target, why in wrong.items() if why} == {}


def test_every_document_is_reached_from_the_index_by_reader() -> None:
    """docs/README.md leads to every document and decision, and the README of the repository leads to docs/README.md."""
    seen, ahead = set[Path](), [ROOT / "docs" / "README.md"]
    while ahead:
        document = ahead.pop()
        if document not in seen and document.suffix == ".md":
            seen.add(document)
            targets = [target.partition("#")[0] for target in links(document) if not re.match(r"[a-z]+:", target)]
            ahead += [(document.parent / target).resolve() for target in targets if target]
    unreached = [str(path.relative_to(ROOT)) for path in MARKDOWN if path.parent.name == "docs" and path not in seen]
    assert unreached == [], "name it in docs/README.md"
    assert {path for path in MARKDOWN if path.parent.name == "decisions"} <= seen
    assert "docs/README.md" in links(ROOT / "README.md")


def test_every_document_belongs_to_a_reader() -> None:
    """Each of docs/*.md lies on one of the four paths, not merely behind a link of another document."""
    listed = re.findall(r"^\d+\. \[[^]]+\]\(([^)]+)\)", (ROOT / "docs" / "README.md").read_text("utf-8"), re.MULTILINE)
    assert {path.name for path in (ROOT / "docs").glob("*.md")} - {"README.md"} <= set(listed)


def test_the_paths_of_readers_give_each_documents_first_sentence() -> None:
    """`make index` would change nothing."""
    text = (ROOT / "docs" / "README.md").read_text("utf-8")
    assert index.paths_of_readers(text) == text, "run `make index`"


@pytest.mark.parametrize("document", MARKDOWN, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_documents_use_the_words_that_were_agreed_on(document: Path) -> None:
    """Again or new, fix, activate: each in the place of a word that a reader has to guess."""
    prose = CODE.sub("", document.read_text("utf-8"))
    assert re.findall(r"\b(?:anew|mend(?:s|ed|ing)?|tak(?:e|es|en) up|taken leave)\b", prose) == []


@pytest.mark.parametrize(
    "wrong", ["docs/nowhere.md", "docs/commands.md#no-such-heading", "../../etc/passwd", "http://a"]
)
def test_a_broken_link_is_found(wrong: str) -> None:
    """The check is not one that lets everything through."""
    assert problem_with(ROOT / "README.md", wrong)


def test_headings_become_the_anchors_that_github_makes(tmp_path: Path) -> None:
    """Punctuation goes, blanks become hyphens, a second one of a name gets a number."""
    (tmp_path / "a.md").write_text("# A `b`: c, d\n\n## X\n\n## X\n\n```\n# no heading\n```\n", "utf-8")
    assert anchors(tmp_path / "a.md") == {"a-b-c-d", "x", "x-1"}
