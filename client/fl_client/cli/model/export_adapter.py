"""`fl-model export-adapter`: write a run's adapter as a PEFT directory."""

from __future__ import annotations

import argparse

from fl_client.cli.model.options import adapter_of, add_model, add_output, at_work, show
from fl_shared.cli.verbs import path

EXAMPLES = """
fl-model export-adapter --spec spec.toml --adapter run.safetensors ./peft
fl-model export-adapter --model ./olmoe-int8 --spec spec.toml --adapter run.safetensors ./peft --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_output(parser)
    add_model(parser)
    parser.add_argument("--adapter", type=path, required=True, help="the run's adapter (safetensors)")
    parser.add_argument("out", type=path, help="new folder")


def run(arguments: argparse.Namespace) -> int:
    """Write the directory, and load it with PEFT once."""
    with at_work(arguments) as say:
        from fl_client.site.files import require_empty
        from fl_shared.documents.spec import RunSpec

        require_empty(arguments.out)
        spec, offset = RunSpec.from_toml(arguments.spec), adapter_of(arguments.adapter)
        say(f"loading the base model {arguments.model}")
        from fl_client.export.peft import export_peft
        from fl_client.model.load import load_model

        model = load_model(arguments.model, arguments.device)
        say(f"writing {arguments.out}, and loading it with PEFT")
        export_peft(model, spec, offset, arguments.out)
    return show(arguments, {"directory": str(arguments.out)})
