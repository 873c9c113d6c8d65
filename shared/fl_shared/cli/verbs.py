"""How a verb of a command is declared, found and run: one file a verb, listed in the command's main file.

A verb's file is a module with

- a first sentence, "`fl-audit budgets`: each ceiling, and what is left of it.": what follows the colon, with the
  paragraphs after it, is the description in the verb's help;
- EXAMPLES: lines as a person types them, without the prompt;
- `add_arguments(parser)`: its options;
- `run(arguments) -> int`: what it does; the exit code.

The command's main file lists the modules, each with its line in the command's help. The last part of a module's name is
the verb's: `train_alone.py` holds `train-alone`. Only the verb that a line names is imported: the command's own help,
`--version` and TAB import none. A verb that another package brings is an entry point (`EntryPoints`); its line is in
VERBS of the folder that it lies in.
"""

from __future__ import annotations

import argparse
import importlib
import itertools
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Protocol, cast

from fl_shared import __version__
from fl_shared.cli.completion import complete, completed_by, completed_words
from fl_shared.cli.entry import cli_main
from fl_shared.cli.extras import missing_package
from fl_shared.errors import DEFECT, INTERRUPTED, READER_GONE, SYSTEM

Parser = argparse.ArgumentParser
Listed = Mapping[str, str]
"""Verbs by the dotted names of their modules, each with its line in the help."""

EXIT_CODES = {
    0: "done",
    2: "wrong arguments or configuration, or a missing package",
    DEFECT: "a defect",
    SYSTEM: "the operating system said no",
    INTERRUPTED: "Ctrl-C",
    READER_GONE: "the output's reader left",
}
"""What every command ends with; a command adds its own."""


class Verb(Protocol):
    """A verb's module."""

    EXAMPLES: str

    def add_arguments(self, parser: Parser) -> None:
        """Add the verb's options."""

    def run(self, arguments: argparse.Namespace) -> int:
        """Do it; the exit code."""


@dataclass(frozen=True)
class Group:
    """Verbs about one kind of thing: `fl-admin sites invite` is `invite` in the group `sites`."""

    name: str
    help: str
    verbs: Listed


@dataclass(frozen=True)
class EntryPoints:
    """Verbs that another package of ours brings: entry points of `group`, each a verb's module."""

    group: str
    package: str


@dataclass(frozen=True)
class Command:
    """One of the commands.

    Args:
        name: as it is typed.
        package: which of ours it belongs to.
        description: what it is for.
        verbs: its verbs, groups of them and those of other packages, in the order of its help.
        examples: lines as a person types them.
        exit_codes: those that it has beside `EXIT_CODES`, and those of which it says more.
        notes: what the help says of environment variables.
        completes: what TAB completes.
        default: the verb of a line that names none.
    """

    name: str
    package: str
    description: str
    verbs: Sequence[Listed | Group | EntryPoints]
    examples: str
    exit_codes: Mapping[int, str] = field(default_factory=dict)
    notes: str = ""
    completes: str = "verbs and options"
    default: str = ""

    def parser(self, words: Sequence[str] | None = None) -> Parser:
        """The command's parser; with `words`, the line that it is to parse, only the verb that they name is imported.

        Raises ConfigError when that verb needs a package that is missing.
        """
        parser = Parser(
            prog=self.name,
            description=self.description,
            epilog=self._epilog(),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        parser.add_argument("--version", action="version", version=f"concordat {__version__}")
        _add_verbs(parser, self.verbs, words)
        return parser

    def line(self, words: Sequence[str]) -> list[str]:
        """The words, with the default verb in front when they name none."""
        if self.default and (not words or (words[0][:1] == "-" and words[0] not in ("-h", "--help", "--version"))):
            return [self.default, *words]
        return list(words)

    def run(self, argv: Sequence[str] | None) -> int:
        """Parse a line (by default the process's own), run its verb, return the exit code."""
        words = self.line(sys.argv[1:] if argv is None else argv)
        typing = completed_words()
        parser = self.parser(words if typing is None else typing)
        complete(parser)
        arguments = parser.parse_args(words)
        return int(arguments.handler(arguments))

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run, and turn what is raised into a message and an exit code."""
        return cli_main(self.run, argv, package=self.package)

    def _epilog(self) -> str:
        codes = sorted((EXIT_CODES | dict(self.exit_codes)).items())
        listed = ", ".join(f"{number}\0{meaning}" for number, meaning in codes)  # a number stays with its first word
        parts = [
            "examples:\n" + textwrap.indent(textwrap.dedent(self.examples).strip(), "  "),
            "Each verb has its own --help with examples.",
            f"{self.notes}\n".lstrip()
            + f'TAB completes {self.completes}: eval "$(register-python-argcomplete {self.name})"',
            textwrap.fill(f"exit codes: {listed}", 116, subsequent_indent="  ").replace("\0", " "),
        ]
        return "\n\n".join(parts) + "\n"


def verb_name(module: str) -> str:
    """The verb that a module holds."""
    return module.rpartition(".")[2].replace("_", "-")


def _add_verbs(parser: Parser, listed: Sequence[Listed | Group | EntryPoints], words: Sequence[str] | None) -> None:
    """Add verbs and groups; those that `words` do not name get a name and a line in the help, and are not imported."""
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    if words is not None:
        words = list(itertools.dropwhile(lambda word: word[:1] == "-", words))
    for entry in listed:
        if isinstance(entry, Group):
            added = verbs.add_parser(entry.name, help=entry.help, description=_sentence(entry.help))
            _add_verbs(added, [entry.verbs], None if words is None else words[1:] if words[:1] == [entry.name] else [])
            continue
        if isinstance(entry, EntryPoints):
            if not words or words[0] not in verbs.choices:  # else no need to read every installed package's metadata
                _add_entry_points(verbs, entry, words)
            continue
        for module, line in entry.items():
            name = verb_name(module)
            added = verbs.add_parser(name, help=line)
            if words is None or name in words[:1]:
                _configure(added, cast("Verb", importlib.import_module(module)))


def _add_entry_points(verbs: Any, points: EntryPoints, words: Sequence[str] | None) -> None:
    """Add another package's verbs; one whose packages are missing says so, and what to install when it is used."""
    for entry in metadata.entry_points(group=points.group):
        chosen = words is None or entry.name in words[:1]
        try:
            listed: Listed = importlib.import_module(entry.module.rpartition(".")[0]).VERBS
            added = verbs.add_parser(entry.name, help=listed[entry.module])
            if chosen:
                _configure(added, entry.load())
        except ImportError as error:
            if chosen:
                raise missing_package(error, points.package) or error from error
            verbs.add_parser(entry.name, help=f"needs packages of {points.package} that are missing")


def _configure(parser: Parser, verb: Verb) -> None:
    """Give a verb's parser its description, examples, options and action."""
    first, _, rest = str(verb.__doc__).partition("\n\n")
    description = f"{_sentence(' '.join(first.partition(': ')[2].split()))} {' '.join(rest.split())}".strip()
    parser.description = textwrap.fill(description, 100)
    parser.epilog = "examples:\n" + textwrap.indent(textwrap.dedent(verb.EXAMPLES).strip(), "  ")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    verb.add_arguments(parser)
    parser.set_defaults(handler=verb.run)


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}" + ("" if text.endswith((".", "?")) else ".")


def path(text: str) -> Path:
    """The type of an option that takes a path: `--home "$UNSET"` is a mistake, not the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path (is a shell variable unset?)")
    return Path(text)


def argument(parser: Parser, *names: str, completer: Callable[..., Any] | None = None, **options: Any) -> None:
    """Add an argument whose values TAB completes."""
    action = parser.add_argument(*names, **options)
    if completer is not None:
        completed_by(action, completer)


def add_json(parser: Parser) -> None:
    """Add `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON")


def add_format(parser: Parser) -> None:
    """Add `--json` and `--csv`, one of which may be given."""
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--json", action="store_true", help="print JSON")
    group.add_argument("--csv", action="store_true", help="print comma-separated values")


def add_quiet(parser: Parser) -> None:
    """Add `--quiet`, for a verb that may take longer than two seconds."""
    parser.add_argument("-q", "--quiet", action="store_true", help="say nothing about progress on standard error")
