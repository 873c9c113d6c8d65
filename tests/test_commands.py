"""What the five commands say about themselves, and what any message tells a person to type, can be typed."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_shared import __version__, errors
from helpers.parsers import COMMANDS, VERBS, parse, typed

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent
SOURCES = sorted(path for part in ("shared", "server", "client") for path in (ROOT / part).rglob("*.py"))
NO_DATA = {("fl-client", "run"), ("fl-client", "supernode"), ("fl-audit", "roles")}
"""Verbs that print no data of their own: the two run until they are stopped, and one prints SQL."""


@pytest.mark.parametrize("path", sorted(VERBS), ids=" ".join)
def test_every_verb_has_a_description_and_examples_that_parse(path: tuple[str, ...]) -> None:
    """The help says what the verb does and shows whole lines, of this verb for the most part, that are accepted."""
    made = VERBS[path]
    assert len(made.description or "") > 15
    lines = [each.strip() for each in (made.epilog or "").partition("examples:\n")[2].split("\n\n")[0].splitlines()]
    own = 0
    for line in lines:
        words = typed(line)
        parse(words)
        own += tuple(words[: len(path)]) == path
    assert 2 * own >= max(1, len(lines))


@pytest.mark.parametrize("path", sorted(set(VERBS) - NO_DATA), ids=" ".join)
def test_every_verb_that_prints_data_prints_json(path: tuple[str, ...]) -> None:
    """`--json` is an option of each."""
    assert "--json" in VERBS[path].format_help()


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_examples_a_version_and_exit_codes(command: str) -> None:
    """`--help` and `--version` are what a person tries first."""
    text = COMMANDS[command]().format_help()
    examples = [line for line in text.partition("examples:\n")[2].split("\n\n")[0].splitlines() if line.strip()]
    for line in examples:
        parse(typed(line.strip()))
    assert len(examples) >= 5
    done = subprocess.run([BIN / command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"concordat {__version__}\n", "")
    listed = {int(number) for number in re.findall(r"\b(\d+) [A-Za-z]", text.partition("exit codes:")[2])}
    assert {0, 2, 70, 74, 130, 141} <= listed <= documented_codes()


@pytest.mark.parametrize("path", sorted(VERBS), ids=" ".join)
def test_no_path_of_any_verb_may_be_empty(path: tuple[str, ...]) -> None:
    """`--home "$UNSET"` would be the directory in which the command happens to run."""
    assert [action.dest for action in VERBS[path]._actions if action.type is Path] == []


def test_an_unset_variable_for_a_home_makes_nothing(tmp_path: Path) -> None:
    """Said as a wrong argument, with what it may come from."""
    line = [str(BIN / "fl-server"), "init", "--home", "", "--host", "c.example"]
    done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 2
    assert "argument --home: an empty path" in done.stderr
    assert list(tmp_path.iterdir()) == []


def documented_codes() -> set[int]:
    """The numbers in the one table of docs/commands.md."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    return {int(number) for number in re.findall(r"^\| (\d+) \|", text, flags=re.MULTILINE)}


def test_the_one_table_of_exit_codes_is_the_code_s() -> None:
    """docs/commands.md lists each exit code of the error family, and no other; the names of the errors fit."""
    kinds = {
        kind.exit_code: kind.__name__
        for kind in vars(errors).values()
        if isinstance(kind, type) and issubclass(kind, errors.ConcordatError)
    }
    others = {0, errors.DEFECT, errors.SYSTEM, errors.INTERRUPTED, errors.READER_GONE}
    assert documented_codes() == set(kinds) | others
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    for number, name in kinds.items():
        assert re.search(rf"^\| {number} \|.*`{name}`", text, flags=re.MULTILINE), name


def test_every_verb_is_in_the_document() -> None:
    """docs/commands.md names each verb of each command, and none that is not there."""
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    named = {tuple(each.split()) for each in re.findall(r"^\| `(fl-[a-z -]+)` \|", text, flags=re.MULTILINE)}
    assert named == set(VERBS)


def texts(node: ast.expr) -> Iterator[str]:
    """Each text that an expression may have: a placeholder is one word, an alternative is a text of its own."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.JoinedStr):
        parts = [part.value if isinstance(part, ast.Constant) else "7" for part in node.values]
        yield "".join(map(str, parts))
    elif isinstance(node, ast.IfExp):
        yield from texts(node.body)
        yield from texts(node.orelse)
    elif isinstance(node, ast.BinOp):
        yield from (left + right for left in texts(node.left) for right in texts(node.right))


def told_to_type(text: str) -> Iterator[str]:
    """The command lines in a text: what stands between backticks, and `fl-…` in the open up to the next stop."""
    for quoted in re.findall(r"`([^`]+)`", text):
        if re.match(r"(fl-[a-z]+|make|pip)\b", quoted):
            yield quoted
    for line in re.findall(r"\bfl-(?:server|admin|client|audit|model)\b[^`;,.:()\n]*", re.sub(r"`[^`]*`", "", text)):
        yield line.strip()


def messages() -> list[tuple[str, str]]:
    """(place, text) of every fix, and of every other string of the code that names one of the commands."""
    found = set()
    for path in SOURCES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        documentation = {
            id(node.body[0].value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and node.body
            and isinstance(node.body[0], ast.Expr)
        }  # fmt: skip
        for node in ast.walk(tree):
            fixes = [k.value for k in node.keywords if k.arg == "fix"] if isinstance(node, ast.Call) else []
            said = [node] if isinstance(node, ast.Constant | ast.JoinedStr) and id(node) not in documentation else []
            for each in [*fixes, *said]:
                found |= {(f"{path.relative_to(ROOT)}:{each.lineno}", text) for text in texts(each)}
    return sorted((place, text) for place, text in found if re.search(r"\bfl-[a-z]|`make |`pip ", text))


def known(words: list[str]) -> bool:
    """Whether a line in running text begins with a command and a verb of it (`fl-audit budgets|spends` are two)."""
    ours = {path[1] for path in VERBS if path[0] == words[0]}
    return bool(ours) and (len(words) == 1 or ours.issuperset(words[1].split("|")) or words[1].startswith("-"))


def test_what_every_message_tells_to_type_exists() -> None:
    """Command lines in messages and fixes: those in backticks are parsed by the command's own parser (with what is
    left out for a reader filled in), those in running text name a verb of it, and `make X` is a target.
    """
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE)
    wrong, seen = [], 0
    for place, text in messages():
        for line in told_to_type(text):
            words = typed(line) if f"`{line}`" in text else line.split()
            words = [each for each in words if each not in ("...", "…")]
            seen += 1
            if words[0] == "make":
                good = words[1] in targets
            elif words[0] == "pip":
                good = True
            elif f"`{line}`" in text:
                good = _parses(words)
            else:
                good = known(words)
            if not good:
                wrong.append((place, line))
    assert not wrong
    assert seen > 60


def _parses(words: list[str]) -> bool:
    """Whether the line is accepted, or lacks only what a reader knows to add: required options, an option's value."""
    try:
        parse(words)
    except ValueError as error:
        if "expected one argument" in str(error):
            return _parses([*words, "x"])
        return known(words) and ("arguments are required" in str(error) or "invalid choice: '7'" in str(error))
    return True


def documented() -> list[tuple[str, str]]:
    """(document, line) of every `fl-…` in a code block of a public document."""
    found = []
    for document in [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md")), *sorted(ROOT.glob("scenarios/*/README.md"))]:
        for block in re.findall(r"```sh\n(.*?)```", document.read_text(encoding="utf-8"), flags=re.DOTALL):
            lines = block.replace("\\\n", " ").splitlines()
            found += [(document.name, line.strip()) for line in lines if line.strip().startswith("fl-")]
    return found


@pytest.mark.parametrize(("document", "line"), documented(), ids=lambda each: each.split("#")[0].strip()[:60])
def test_every_documented_line_parses(document: str, line: str) -> None:
    """Not only the verb of a documented line exists: its options and arguments do, too."""
    parse(typed(line))


def test_nothing_that_is_printed_to_be_typed_goes_unquoted() -> None:
    """After an option of a command, or `chmod`, a message puts what may hold a space only through `shlex.quote`."""
    wrong = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.JoinedStr):
                continue
            so_far = ""
            for value in node.values:
                if isinstance(value, ast.Constant):
                    so_far += str(value.value)
                elif re.search(r"(\bfl-[a-z]+ [^`;]*--[a-z-]+|\bchmod \d+) $", so_far) and not _quoted(value):
                    wrong.append(f"{path.relative_to(ROOT)}:{node.lineno}")
    assert not wrong


def _quoted(value: ast.expr) -> bool:
    """Whether a shell reads it back whole: it is quoted, or a name that cannot hold a space."""
    assert isinstance(value, ast.FormattedValue)
    if isinstance(value.value, ast.Call):
        return ast.unparse(value.value.func) in ("quote", "shlex.quote", "command")
    return bool(re.search(r"\b(site|run|round|noise|name|role)\b", ast.unparse(value.value)))


def test_a_command_with_a_space_in_it_pastes_back() -> None:
    """`console.command` is what a shell reads back into the same words."""
    from fl_shared.cli.output import command

    words = ["fl-client", "check", "--home", "/srv/a b/d'é $(x)"]
    assert shlex.split(command(*words)) == words
