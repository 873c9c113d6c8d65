"""docs/architecture.md is true: its map is the folders and the import contracts, and every name in it exists."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import re
from pathlib import Path

import pytest

from helpers import index
from helpers.names import resolve
from helpers.parsers import COMMANDS, VERBS, typed

ROOT = index.ROOT
PAGE = ROOT / "docs" / "architecture.md"
TEXT = PAGE.read_text("utf-8")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md"), *ROOT.glob("scenarios/*/*.md")])
BLOCKS = re.compile(r"^ *```.*?^ *```$", re.DOTALL | re.MULTILINE)
SPANS = sorted(set(re.findall(r"`([^`\n]+)`", BLOCKS.sub("", TEXT))))
PATH = re.compile(r"(fl_(?:shared|server|client)(?:\.\w+)*)(?:\((.*)\))?")


@functools.cache
def words_of_the_code() -> frozenset[str]:
    """Every word in code, protocols and settings of the three packages: what a name in a document may be."""
    kinds = ("*.py", "*.proto", "*.toml", "*.ini")
    text = "\n".join(
        path.read_text("utf-8")
        for part in index.PACKAGES.values()
        for kind in kinds
        for path in (ROOT / part).rglob(kind)
    )
    return frozenset(re.findall(r"[A-Za-z0-9_]+(?:[-.][A-Za-z0-9_]+)*", text)) | frozenset(
        re.findall(r"[A-Za-z0-9_]+", text)
    )


def routes() -> set[str]:
    """The paths that gateway and monitoring serve."""
    text = "".join(
        path.read_text("utf-8")
        for path in [*(ROOT / "server/fl_server/gateway").glob("*.py"), ROOT / "shared/fl_shared/runtime/monitoring.py"]
    )
    return set(re.findall(r'"(/[a-z0-9/]+)"', text))


def problem_with(span: str) -> str:
    """What is wrong with a name in backticks; "" when it is what the code has."""
    words = span.split()
    if found := PATH.fullmatch(span):
        return _problem_with_path(found[1], found[2])
    if re.fullmatch(r"\w+(\.\w+)*\(.*\)", span):
        return "write a function's whole name, from fl_… on"
    if words[0] in COMMANDS:
        verb = tuple(word for word in words if not word.startswith("-"))
        known = {path[:size] for path in VERBS for size in range(1, len(path) + 1)}
        options = [word for word in words if word.startswith("--")]
        text = VERBS[verb].format_help() if verb in VERBS else ""
        return "" if verb in known and all(each in text for each in options) else "no such command, verb or option"
    if found := re.fullmatch(r"(?:GET |POST )?(/[\w/]+?)(?:/\*)?", span):
        return "" if found[1] in routes() else "no route of gateway or monitoring"
    if words[0] == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE)
        return "" if words[1] in targets else "no target of the Makefile"
    if (ROOT / span).exists():
        return ""
    missing = [word for word in re.findall(r"[A-Za-z_][\w.-]*\w", span) if word not in words_of_the_code()]
    return f"not in the code: {', '.join(missing)}" if missing else ""


def _problem_with_path(name: str, parameters: str | None) -> str:
    try:
        found = resolve(name)
    except AttributeError as error:
        return str(error)
    if not parameters:
        return ""
    real = [each for each in inspect.signature(found).parameters if each not in ("self", "cls")]
    told = [each.strip() for each in parameters.split(",")]
    return "" if told == real else f"its parameters are ({', '.join(real)})"


@pytest.mark.parametrize("span", SPANS)
def test_every_name_in_the_page_exists(span: str) -> None:
    """Modules, functions with their parameters, commands, options, routes, files, settings, fields, codes."""
    assert problem_with(span) == "", f"docs/architecture.md says `{span}`"


@pytest.mark.parametrize(
    "wrong",
    [
        "fl_shared.ledger.service.Ledger.recover_all",
        "fl_shared.ledger.service.Ledger.settle(reservation, digest)",
        "fl_client.training.strategy",
        "ledger.recover()",
        "fl-admin runs abolish",
        "fl-server up --colour",
        "GET /v1/goodbye",
        "make coffee",
        "keys/signing.pubx",
        "merkle_trunk",
        "[policy] most_epsilon",
        "client/fl_client/model/huge",
    ],
)
def test_what_does_not_exist_is_found(wrong: str) -> None:
    """The check is not one that lets everything through."""
    assert problem_with(wrong)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_dotted_name_in_any_document_exists(document: Path) -> None:
    """`fl_….x.y` in documents, decisions and scenarios is a module, class or function of today."""
    wrong = {}
    for name in set(re.findall(r"\bfl_(?:shared|server|client)(?:\.\w+)+", document.read_text("utf-8"))):
        try:
            resolve(name)
        except AttributeError as error:
            wrong[name] = str(error)
    assert wrong == {}


def lines_in_prose() -> list[str]:
    """Every `fl-… verb …` in the prose of a document; those in blocks are held by tests/test_docs.py."""
    found = {
        span
        for document in DOCUMENTS
        for span in re.findall(r"`(fl-[a-z]+ [^`\n]+)`", BLOCKS.sub("", document.read_text("utf-8")))
    }
    return sorted(found)


@pytest.mark.parametrize("line", lines_in_prose())
def test_every_command_in_prose_exists(line: str) -> None:
    """A verb or group of verbs, with options of its own; capitals and what follows an option stand for values."""
    words = typed(line)
    known = {path[:size] for path in VERBS for size in range(1, len(path) + 1)}
    verb = max((path for path in known if tuple(words[: len(path)]) == path), key=len)
    rest = words[len(verb) :]
    assert not rest or verb in VERBS, f"{rest[0]} is no verb of {' '.join(verb)}"
    options = {word for word in rest if word.startswith("-") and word != "-"}
    assert options <= set(re.findall(r"(?<![\w-])--?[a-z][a-z-]*", VERBS[verb].format_help() if rest else ""))


def test_every_test_that_is_named_without_its_file_exists() -> None:
    """`test_…` in a document is a function of a test file."""
    code = "\n".join(path.read_text("utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    real = set(re.findall(r"^ *def (test_\w+)\(", code, flags=re.MULTILINE))
    named = {name for document in DOCUMENTS for name in re.findall(r"`(test_\w+)`", document.read_text("utf-8"))}
    assert named
    assert named <= real


def test_the_map_is_the_folders_and_the_contracts() -> None:
    """`make index` would change nothing: floors of pyproject.toml, first sentences of the rooms."""
    assert index.map_of_the_house(TEXT) == TEXT, "run `make index`"
    assert "MISSING" not in TEXT


@pytest.mark.parametrize("package", sorted(index.PACKAGES))
def test_every_room_stands_on_one_floor(package: str) -> None:
    """Contracts and folders name the same rooms; what is in brackets has no folder yet, or has just got one."""
    rooms = [room for layer in index.floors(package) for room in layer]
    names = [room.strip("()") for room in rooms]
    assert len(names) == len(set(names))
    ours = index.rooms_on_disk(package) - {"adapter"}  # for apps of older coordinators (decision 0110)
    assert {room for room in rooms if not room.startswith("(")} <= ours <= set(names)


@pytest.mark.parametrize("package", sorted(index.PACKAGES))
def test_every_room_says_what_it_is(package: str) -> None:
    """A sentence that ends, of more than two words, which no other room has."""
    told = [index.room_sentence(package, room) for room in sorted(index.rooms_on_disk(package))]
    assert all(sentence.endswith(".") and len(sentence.split()) > 2 for sentence in told), told
    assert len(told) == len(set(told))


def documents() -> list[tuple[str, set[str]]]:
    """(class, fields) of each row in the table of documents."""
    table = TEXT.split("### Documents")[1].split("\n\n")[2]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()[2:]]
    return [(row[0].strip("`"), {name.strip() for name in row[2].split(",")}) for row in rows]


@pytest.mark.parametrize(("name", "fields"), documents(), ids=lambda value: value if isinstance(value, str) else "")
def test_the_fields_of_every_document_are_listed(name: str, fields: set[str]) -> None:
    """Each field of the class, and beside them only what the class has as a property."""
    found = resolve(name)
    declared = getattr(found, "model_fields", None)  # pydantic's, if it is one of its models
    wanted = (set(declared) if declared else {field.name for field in dataclasses.fields(found)}) - {"kind"}
    assert wanted - fields == set(), f"docs/architecture.md leaves out fields of {name}"
    assert {
        each
        for each in fields - wanted
        if not isinstance(getattr(found, each, None), property | functools.cached_property)
    } == set(), f"docs/architecture.md gives {name} fields that it has not"


def test_the_spec_in_the_page_is_one_that_is_accepted(tmp_path: Path) -> None:
    """Typed as it stands, with a digest and labels in the place of the dots."""
    read = re.search(r"`(fl_shared[\w.]+\.from_toml)\(path\)`", TEXT)
    assert read is not None
    toml = TEXT.split("```toml\n")[1].split("```")[0].replace("sha256:…", f"sha256:{'0' * 64}").replace("…", "C")
    (tmp_path / "spec.toml").write_text(toml, "utf-8")
    spec = resolve(read[1])(tmp_path / "spec.toml")
    assert {section.partition("]")[0] for section in re.findall(r"^\[(.+)", toml, re.MULTILINE)} <= set(spec.to_dict())
