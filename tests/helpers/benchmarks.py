"""Benchmarks as modules. Opacus installs a package `benchmarks`, so ours cannot be imported by that name."""

from __future__ import annotations

import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

_TESTS = Path(__file__).resolve().parents[1]


def load_benchmark(name: str, directory: str = "benchmarks") -> ModuleType:
    """`tests/benchmarks/NAME.py` (or of another directory), executed as a module of that name."""
    spec = spec_from_file_location(name, _TESTS / directory / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
