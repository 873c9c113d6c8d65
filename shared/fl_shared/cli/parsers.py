"""What the parsers of all commands have in common: a version, a description, examples that can be typed, --quiet."""

from __future__ import annotations

import argparse
import textwrap
from pathlib import Path

from fl_shared import __version__

QUIET = "say nothing about progress on standard error"


def path(text: str) -> Path:
    """The type of an option that takes a path: `--home "$UNSET"` is a mistake, not the current directory."""
    if not text:
        raise argparse.ArgumentTypeError("an empty path (is a shell variable unset?)")
    return Path(text)


def add_version(parser: argparse.ArgumentParser) -> None:
    """Add `--version`."""
    parser.add_argument("--version", action="version", version=f"concordat {__version__}")


def add_quiet(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet`, for a verb that may take longer than two seconds."""
    parser.add_argument("-q", "--quiet", action="store_true", help=QUIET)


def describe(parser: argparse.ArgumentParser, summary: str, examples: str, more: str = "") -> None:
    """Give a verb its description and its examples: lines as a person types them, without the prompt."""
    whole = f"{summary[:1].upper()}{summary[1:]}"
    whole += "" if whole.endswith((".", "?")) else "."
    parser.description = textwrap.fill(f"{whole} {more}".strip(), 100)
    parser.epilog = "examples:\n" + textwrap.indent(textwrap.dedent(examples).strip(), "  ")
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
