"""`fl-model build`: build a base model from nothing.

It takes an hour or so on a CPU, and needs the extra 'demo' and WordNet.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from fl_client.cli.model.options import add_output, at_work, show
from fl_shared.cli.verbs import path

EXAMPLES = """
fl-model build tiny --out ./tiny --wordnet /usr/share/wordnet
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_output(parser)
    parser.add_argument("name", choices=["tiny"])
    parser.add_argument("--out", type=path, default=Path("tiny"), help="new folder (default: ./tiny)")
    parser.add_argument("--steps", type=_positive, default=2200, help="pretraining steps (default: 2200)")
    parser.add_argument("--wordnet", type=path, help="folder with WordNet's data.noun")


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Build it, and print its figures."""
    with at_work(arguments, "demo") as say:
        from fl_client.model.recipe.build import build_tiny

        report = build_tiny(arguments.out, steps=arguments.steps, wordnet=arguments.wordnet, say=say)
    return show(arguments, report)
