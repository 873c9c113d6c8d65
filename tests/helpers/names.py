"""What a dotted name in a document stands for, and where the function of that name has gone when it is nothing."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import re
from typing import Any

from helpers.index import PACKAGES, ROOT


def resolve(name: str) -> Any:
    """The module, class or function behind a dotted name; AttributeError with what to write instead."""
    with contextlib.suppress(ModuleNotFoundError):
        if (spec := importlib.util.find_spec(name)) is not None:
            return spec  # of a module: some do something when they are imported
    parts, found = name.split("."), None
    for length in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if not error.name or not name.startswith(error.name):
                raise
            continue
        for part in parts[length:]:
            if part in getattr(found, "__annotations__", {}) and not hasattr(found, part):
                return None  # a field without a default
            found = getattr(found, part, None)
            if found is None:
                raise AttributeError(f"{name} does not exist; {places_of(parts[-1])}")
        return found
    raise AttributeError(f"{name} does not exist; {places_of(parts[-1])}")


def places_of(name: str) -> str:
    """Where a function or class of this name is today, for whoever has moved it."""
    sought = re.compile(rf"^ *(?:async )?(?:def|class) {re.escape(name)}\b", re.MULTILINE)
    places = [
        ".".join(path.relative_to(ROOT / part).with_suffix("").parts)
        for part in PACKAGES.values()
        for path in sorted((ROOT / part).rglob("*.py"))
        if sought.search(path.read_text("utf-8"))
    ]
    return f"write its present place: {', '.join(places) or 'there is none of this name, so take the line out'}"
