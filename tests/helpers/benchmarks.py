"""Benchmarks as modules. Opacus installs a package `benchmarks`, so ours cannot be imported by that name."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_DIRECTORY = Path(__file__).resolve().parents[1] / "benchmarks"


def load_benchmark(name: str) -> ModuleType:
    """`tests/benchmarks/NAME.py`, executed as a module of that name."""
    spec = spec_from_file_location(name, _DIRECTORY / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
