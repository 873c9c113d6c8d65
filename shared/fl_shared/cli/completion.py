"""Completion with TAB, by argcomplete; switched on with `eval "$(register-python-argcomplete fl-admin)"`."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import argcomplete


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end, when it is a shell that asks; does nothing otherwise. Call before `parse_args`."""
    argcomplete.autocomplete(parser)


def completed_words() -> list[str] | None:
    """The words after the command on the line that a shell wants completed; None when no shell asks."""
    return os.environ.get("COMP_LINE", "").split()[1:] if "_ARGCOMPLETE" in os.environ else None


def known_sites(**_: Any) -> list[str]:
    """The sites that have their home in the usual place on this machine."""
    try:
        return sorted(folder.name for folder in (Path.home() / ".concordat" / "site").iterdir() if folder.is_dir())
    except OSError:
        return []


def completed_by(action: argparse.Action, completer: Any) -> None:
    """Let TAB offer what `completer` returns for an argument's value."""
    action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks for it
