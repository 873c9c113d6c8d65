"""`fl-model inspect`: parameters, active parameters a token, bytes, digest.

A run's spec names the digest.
"""

from __future__ import annotations

import argparse

from fl_client.cli.model.options import add_output, at_work, show

EXAMPLES = """
fl-model inspect tiny
fl-model inspect ./OLMoE-1B-7B --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_output(parser)
    parser.add_argument("directory", help="a model directory, or tiny")


def run(arguments: argparse.Namespace) -> int:
    """Print the model's figures."""
    with at_work(arguments) as say:
        from fl_client.model.inspect import inspect_directory
        from fl_client.model.load import resolve

        say("reading and hashing the model")
        report = inspect_directory(resolve(arguments.directory))
    return show(arguments, report.to_dict())
