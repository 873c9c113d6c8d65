"""How verbs are declared: every file of a command's folder is listed or helps those that are."""

from __future__ import annotations

import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_client.cli.audit import VERBS as BROUGHT
from fl_shared.cli.verbs import EntryPoints, Group, Listed, verb_name
from helpers.parsers import DECLARED, VERBS

HEAVY = ("torch", "flwr", "transformers", "opacus", "sqlalchemy", "grpc", "numpy", "dp_accounting", "fl_client.dp")


def listed(command: str) -> Iterator[tuple[tuple[str, ...], str]]:
    """The words of each verb of a command, and its module."""
    for each in DECLARED[command].verbs:
        if isinstance(each, EntryPoints):
            yield from (((command, verb_name(module)), module) for module in BROUGHT)
            continue
        verbs: Listed = each.verbs if isinstance(each, Group) else each
        group = (each.name,) if isinstance(each, Group) else ()
        yield from (((command, *group, verb_name(module)), module) for module in verbs)


EVERY = {words: module for command in DECLARED for words, module in listed(command)}


def test_the_lists_are_all_verbs_there_are() -> None:
    """What the parsers offer is what the lists name: nothing is found by a scan."""
    assert set(EVERY) == set(VERBS)


@pytest.mark.parametrize("words", sorted(EVERY), ids=" ".join)
def test_every_verb_has_the_one_shape(words: tuple[str, ...]) -> None:
    """A first sentence that begins with the verb as it is typed, examples, options, an action, a fitting file."""
    module = importlib.import_module(EVERY[words])
    assert str(module.__doc__).startswith(f"`{' '.join(words)}`: ")
    assert f"{' '.join(words[:2])}" in module.EXAMPLES or words[-1] == "run"
    assert list(inspect.signature(module.add_arguments).parameters) == ["parser"]
    assert list(inspect.signature(module.run).parameters) == ["arguments"]
    if len(words) == 3:
        assert Path(str(module.__file__)).parent.name == words[1]


@pytest.mark.parametrize("package", ["fl_client.cli", "fl_server.cli", "fl_shared.audit.cli"])
def test_no_file_of_a_verb_is_forgotten(package: str) -> None:
    """A file with `run` and `add_arguments` that no list names would be a verb that nobody finds."""
    root = Path(str(importlib.import_module(package).__file__)).parent
    for file in root.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        name = ".".join([package, *file.relative_to(root).with_suffix("").parts])
        if "\ndef add_arguments(" in text and "\ndef run(" in text:
            assert name in EVERY.values()


@pytest.mark.parametrize("command", sorted(DECLARED))
@pytest.mark.parametrize("line", ["--help", "--version", "no-such-verb"])
def test_a_line_that_names_no_verb_imports_none(command: str, line: str) -> None:
    """The command's own help is there at once: no verb, and nothing that takes long to import."""
    modules = {module for module in EVERY.values() if module.startswith(DECLARED[command].package)}
    assert imported(command, line) & (modules | set(HEAVY)) == set()


@pytest.mark.parametrize("words", [("fl-client", "status"), ("fl-admin", "runs", "stop"), ("fl-server", "status")])
def test_a_line_imports_the_verb_that_it_names_alone(words: tuple[str, ...]) -> None:
    """And neither torch nor Flower before that verb runs."""
    found = imported(words[0], *words[1:], "--help")
    assert found & set(EVERY.values()) == {EVERY[words]}
    assert found & {"torch", "flwr", "transformers", "opacus"} == set()


def imported(command: str, *words: str) -> set[str]:
    """The modules that a process of the command has imported at its end."""
    home = next(iter(module for (name, *_), module in EVERY.items() if name == command)).rpartition(".")[0]
    package = ".".join(home.split(".")[:3])
    code = (
        f"import sys; from {package} import COMMAND\n"
        f"try: COMMAND.run({list(words)!r})\nexcept SystemExit: pass\n"
        "print('\\n' + ' '.join(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.splitlines()[-1].split())
