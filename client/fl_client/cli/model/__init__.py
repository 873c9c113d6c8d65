"""The command `fl-model`: build, quantise, inspect and evaluate base models; export an adapter as PEFT."""

from __future__ import annotations

from collections.abc import Sequence

from fl_shared.cli.verbs import Command
from fl_shared.runtime.offline import stay_offline

VERBS = {
    "fl_client.cli.model.build": "build a base model from nothing",
    "fl_client.cli.model.quantize": "quantise a Hugging Face MoE directory, tensor by tensor",
    "fl_client.cli.model.inspect": "parameters, active parameters a token, bytes, digest",
    "fl_client.cli.model.evaluate": "accuracy on public data (nothing is accounted: never name private data)",
    "fl_client.cli.model.export_adapter": "write a run's adapter as a PEFT directory",
}

COMMAND = Command(
    name="fl-model",
    package="fl_client",
    description="Build, quantise, inspect and evaluate base models; turn a run's adapter into a PEFT directory.",
    verbs=[VERBS],
    examples="""
        fl-model inspect tiny                         # the base that ships with the package
        fl-model inspect ./OLMoE-1B-7B --json
        fl-model quantize ./OLMoE-1B-7B ./olmoe-int8
        fl-model quantize ./OLMoE-1B-7B ./olmoe-int4 --bits 4
        fl-model build tiny --out ./tiny --wordnet /usr/share/wordnet
        fl-model evaluate --model tiny --spec spec.toml --data held-out.csv --adapter run.safetensors
        fl-model export-adapter --model tiny --spec spec.toml --adapter run.safetensors ./peft
    """,
    exit_codes={14: "model", 15: "data"},
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `fl-model`."""
    stay_offline()
    return COMMAND.main(argv)
