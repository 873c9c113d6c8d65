"""Completion with TAB, by argcomplete; switched on with `eval "$(register-python-argcomplete fl-admin)"`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import argcomplete


def complete(parser: argparse.ArgumentParser) -> None:
    """Answer the shell and end, when it is a shell that asks; does nothing otherwise. Call before `parse_args`."""
    argcomplete.autocomplete(parser)


def known_sites(**_: Any) -> list[str]:
    """The sites that have their home in the usual place on this machine."""
    try:
        return sorted(each.name for each in (Path.home() / ".concordat" / "site").iterdir() if each.is_dir())
    except OSError:
        return []


def completed_by(action: argparse.Action, completer: Any) -> None:
    """Let TAB offer what `completer` returns for an argument's value."""
    action.completer = completer  # type: ignore[attr-defined]  # where argcomplete looks for it
