"""What the verbs of `fl-model` have in common: options, a run's adapter, a table of figures."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fl_shared.cli.extras import require
from fl_shared.cli.output import Say, facts, print_json, working
from fl_shared.cli.verbs import add_json, add_quiet, path


def add_output(parser: argparse.ArgumentParser) -> None:
    """Add `--json` and `--quiet`."""
    add_json(parser)
    add_quiet(parser)


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add `--model`, `--spec` and `--device`."""
    parser.add_argument("--model", default="tiny", help="a model directory, or tiny (default)")
    parser.add_argument("--spec", type=path, required=True, help="the run's spec")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="default: cpu")


def at_work(arguments: argparse.Namespace, *extras: str) -> AbstractContextManager[Say]:
    """Show progress while the body runs; ConfigError when a package of these extras, or of `client`, is missing."""
    for extra in ("client", *extras):
        require(extra)
    return working(f"{arguments.verb}: loading", quiet=arguments.quiet, json=arguments.json)


def show(arguments: argparse.Namespace, table: Mapping[str, Any]) -> int:
    """Print the figures; the exit code."""
    if arguments.json:
        print_json(table)
        return 0
    facts(
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
        for name, value in table.items()
    )
    return 0


def adapter_of(file: Path) -> dict[str, Any]:
    """The tensors of a run's adapter."""
    from fl_shared.adapters.safetensors import read_adapter, unpack

    return unpack(read_adapter(file))
