"""Which layers of which model family may be adapted. A new family is one small file in this package.

Every file defines `ARCHITECTURES`, a tuple of `Architecture`. Nothing is guessed: a model type that no file names
is refused at start-up, and every adapted family is held against a batch-size-1 loop before it trains
(`fl_client.dp.checks`).
"""

from __future__ import annotations

import functools
import importlib
import pkgutil

from fl_client.model.architectures.base import Architecture
from fl_shared.errors import EngineError

__all__ = ["Architecture", "architecture_of", "known_architectures"]


@functools.cache
def known_architectures() -> dict[str, Architecture]:
    """Every family by its Hugging Face `model_type`."""
    known: dict[str, Architecture] = {}
    for module in pkgutil.iter_modules(__path__):
        if module.name != "base":
            for entry in importlib.import_module(f"{__name__}.{module.name}").ARCHITECTURES:
                known[entry.model_type] = entry
    return known


def architecture_of(model_type: str) -> Architecture:
    """The family of a `model_type`; EngineError names it when it is unknown."""
    known = known_architectures()
    if model_type not in known:
        raise EngineError(
            f"models of type {model_type!r} are not supported for private training",
            fix=f"use one of {', '.join(sorted(known))}, or add a file under fl_client/model/architectures",
        )
    return known[model_type]
