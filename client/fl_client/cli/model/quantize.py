"""`fl-model quantize`: quantise a Hugging Face MoE directory, tensor by tensor."""

from __future__ import annotations

import argparse

from fl_client.cli.model.options import add_output, at_work, show
from fl_shared.cli.verbs import path

EXAMPLES = """
fl-model quantize ./OLMoE-1B-7B ./olmoe-int8
fl-model quantize ./OLMoE-1B-7B ./olmoe-int4 --bits 4 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_output(parser)
    parser.add_argument("directory", type=path, help="the model's directory")
    parser.add_argument("out", type=path, help="new folder")
    parser.add_argument(
        "--bits", type=int, choices=[4, 8], default=8, help="8 (default), or 4: half the memory, larger errors"
    )


def run(arguments: argparse.Namespace) -> int:
    """Quantise it, and print sizes and digest."""
    with at_work(arguments) as say:
        from fl_client.model.inspect import inspect_directory
        from fl_client.model.quantise import quantise_directory

        report = quantise_directory(
            arguments.directory,
            arguments.out,
            arguments.bits,
            progress=lambda done, total: say("quantising", done, total),
        )
        say("hashing")
        digest = inspect_directory(arguments.out).digest
    return show(
        arguments,
        {
            "directory": str(arguments.out),
            "bytes_before": report.bytes_before,
            "bytes_after": report.bytes_after,
            "quantised_layers_ratio": round(report.quantised_after / report.quantised_before, 4),
            "digest": digest,
        },
    )
