"""Folders that a command fills: whole, or as they were."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from fl_shared.errors import ModelError


def require_empty(directory: Path) -> None:
    """ModelError when `directory` is there and is no empty folder."""
    try:
        if directory.exists() and any(directory.iterdir()):
            raise ModelError(f"{directory} holds files", fix="name a new or empty folder")
    except OSError as error:
        raise ModelError(f"{directory}: {error.strerror}", fix="name a new or empty folder") from error


@contextlib.contextmanager
def filled_or_gone(directory: Path) -> Iterator[None]:
    """A new or empty folder that the block fills; whatever ends the block early, Ctrl-C too, leaves it as it was.

    After a power cut or kill -9 part of it may lie there: who fills it writes last what makes the folder valid.
    Raises ModelError when it holds files, is none, or the disk refuses.
    """
    require_empty(directory)
    new = not directory.exists()
    try:
        directory.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException as error:
        if directory.is_dir():
            for path in directory.iterdir():
                path.unlink()
            if new:
                directory.rmdir()
        from safetensors import SafetensorError  # here alone: commands that write no model start without it

        if isinstance(error, OSError | SafetensorError):
            reason = getattr(error, "strerror", None) or error
            raise ModelError(f"{directory}: {reason}", fix="make room, or name another folder") from error
        raise
