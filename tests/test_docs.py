"""The public documents stay true: what they say a person can type exists."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from helpers.parsers import parse

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("scenarios/*/README.md")])


def commands() -> list[tuple[str, ...]]:
    """Every `fl-… verb [verb]` in a code block of a public document, without its options."""
    found = set()
    for document in DOCUMENTS:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
            for line in block.splitlines():
                words = line.split("#")[0].split()
                if words and words[0].startswith("fl-"):
                    verbs = []
                    for word in words[1:3]:
                        if not re.fullmatch(r"[a-z][a-z-]*", word) or "-0" in word:
                            break
                        verbs.append(word)
                    found.add((words[0], *verbs))
    return sorted(found)


@pytest.mark.parametrize("line", commands(), ids=" ".join)
def test_every_documented_command_exists(line: tuple[str, ...]) -> None:
    """A command that a document shows answers to --help, by its own parser (`test_commands.py` runs the scripts)."""
    parse([*line, "--help"])


def test_every_make_target_in_the_readme_exists() -> None:
    """`make X` in the README is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / "README.md").read_text(encoding="utf-8")))
    assert named
    assert named <= targets


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_to_a_file_leads_somewhere(document: Path) -> None:
    """Relative links in the documents point to files that exist."""
    for target in re.findall(r"\]\(([^)#]+?)(?:#[^)]*)?\)", document.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_test_that_a_document_names_exists(document: Path) -> None:
    """A path `tests/…` in a document is a file or folder of tests; `tests/…::name` is a test in it."""
    for target in re.findall(r"`(tests/[^`\s]+)`", document.read_text(encoding="utf-8")):
        path, _, name = target.partition("::")
        assert (ROOT / path).exists(), target
        assert not name or f"\ndef {name}(" in (ROOT / path).read_text(encoding="utf-8"), target


def test_every_decision_that_is_cited_exists() -> None:
    """A number after `docs/decisions/` or the word `decision`, in code or documents, names exactly one record."""
    records = [path.name[:4] for path in (ROOT / "docs" / "decisions").glob("[0-9]*.md")]
    assert len(records) == len(set(records))
    code = [path for part in ("shared", "server", "client", "tests") for path in (ROOT / part).rglob("*.py")]
    places = [*DOCUMENTS, *(ROOT / "docs" / "decisions").glob("*.md"), *code]
    cited = {
        (number, str(path.relative_to(ROOT)))
        for path in places
        for number in re.findall(r"(?:docs/decisions/|\bdecisions? )(\d{4})\b", path.read_text(encoding="utf-8"))
    }
    assert cited
    assert {each for each in cited if each[0] not in records} == set()
