"""The parsers of the five commands, and what a person may type for each of their verbs."""

from __future__ import annotations

import argparse
import contextlib
import io
import shlex
from collections.abc import Callable, Sequence

from fl_client.cli import client, model
from fl_server.cli import admin, server
from fl_shared.audit import cli as audit
from fl_shared.cli.verbs import Command

Parser = argparse.ArgumentParser
DECLARED: dict[str, Command] = {made.COMMAND.name: made.COMMAND for made in (server, admin, client, audit, model)}
COMMANDS: dict[str, Callable[[], Parser]] = {name: command.parser for name, command in DECLARED.items()}


def verbs(made: Parser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], Parser]:
    """Every verb's parser by its words; groups of verbs are no verbs."""
    found: dict[tuple[str, ...], Parser] = {}
    for action in made._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, sub in action.choices.items():
                found |= verbs(sub, (*path, name))
    return found or {path: made}


VERBS: dict[tuple[str, ...], Parser] = {
    (name, *path): sub for name, parser in COMMANDS.items() for path, sub in verbs(parser()).items()
}
"""`(command, verb)` or `(command, group, verb)`: its parser."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """What the command's own parser makes of a whole line; ValueError with its complaint when it refuses."""
    if words[0] not in COMMANDS:
        raise ValueError(f"there is no command {words[0]}")
    told = io.StringIO()
    rest = DECLARED[words[0]].line(words[1:])
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
        try:
            return COMMANDS[words[0]]().parse_args(rest)
        except SystemExit as end:
            if end.code == 0:  # --help, --version
                return argparse.Namespace()
            raise ValueError(f"{shlex.join(words)}: {told.getvalue().strip().splitlines()[-1]}") from None


def typed(line: str) -> list[str]:
    """The words of a line up to a comment, a pipe, a redirection or an ampersand."""
    words = shlex.split(line, comments=True)
    ends = [words.index(mark) for mark in ("|", ">", "&&", "&") if mark in words]
    return words[: min(ends)] if ends else words
