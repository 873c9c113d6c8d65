"""What a model directory is: parameters, parameters that work on one token, bytes, digest."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from fl_client.model.checkpoint import fast_tokenizer, float_tensors, require_quantised
from fl_client.model.layout import (
    QUANTISATION_KEY,
    directory_digest,
    expert_count,
    expert_modules,
    quantised_linears,
    read_config,
    skeleton,
    unreadable,
    weight_files,
)
from fl_client.model.load import read_features, with_quantised_layers

_FLOAT32_BYTES = 4


@dataclass(frozen=True, slots=True)
class Inspection:
    """Facts of a model directory. Bytes count tensors, not file headers.

    `quantised_layers_*` are of the layers that are (or would be) quantised; embeddings, norms, router and output head
    stay float.
    """

    directory: str
    architecture: str
    quantised: bool
    bits: int
    parameters: int
    active_parameters: int
    active_share: float
    routed_experts: int
    experts_per_token: int
    bytes_float32: int
    bytes_on_disk: int
    quantised_layers_float32_bytes: int
    quantised_layers_bytes: int
    digest: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dataclasses.asdict(self)


def inspect_directory(directory: Path) -> Inspection:
    """Read config, tokenizer and tensor headers; no weight is loaded.

    ModelError when the directory is neither a model that can be loaded nor one that can be quantised.
    """
    config = read_config(directory)
    model = skeleton(directory)
    settings = config.get(QUANTISATION_KEY)
    if settings is None:
        float_tensors(directory, model)
    else:
        require_quantised(directory, with_quantised_layers(skeleton(directory), settings["bits"], settings["group"]))
    fast_tokenizer(directory, int(model.get_input_embeddings().weight.shape[0]))  # type: ignore[operator]  # a method
    read_features(directory, int(model.config.hidden_size))  # type: ignore[union-attr,arg-type]  # every config has it
    parameters = sum(parameter.numel() for parameter in model.parameters())
    experts = expert_modules(model)
    routed = sum(p.numel() for module in experts.values() for p in module.parameters())
    count = expert_count(model)
    chosen = int(model.config.num_experts_per_tok) if count else 0  # type: ignore[union-attr,arg-type]  # MoE configs have it
    active = parameters - routed + (routed * chosen // count if count else 0)
    names = {f"{name}.weight" for name in quantised_linears(model)}
    quantisable = routed + sum(dict(model.named_parameters())[name].numel() for name in names)
    on_disk, quantised_bytes = _bytes_on_disk(directory)
    return Inspection(
        directory=str(directory),
        architecture=str(config["model_type"]),
        quantised=settings is not None,
        bits=int(settings["bits"]) if settings is not None else 0,
        parameters=parameters,
        active_parameters=active,
        active_share=round(active / parameters, 4),
        routed_experts=count,
        experts_per_token=chosen,
        bytes_float32=_FLOAT32_BYTES * parameters,
        bytes_on_disk=on_disk,
        quantised_layers_float32_bytes=_FLOAT32_BYTES * quantisable,
        quantised_layers_bytes=quantised_bytes,
        digest=directory_digest(directory),
    )


def _bytes_on_disk(directory: Path) -> tuple[int, int]:
    """(bytes of all tensors, bytes of quantised values and their scales)."""
    total = quantised = 0
    for path in weight_files(directory):
        try:
            with safe_open(path, framework="pt"), path.open("rb") as source:  # the library has checked the header
                header = json.loads(source.read(int.from_bytes(source.read(8), "little")))
        except (OSError, SafetensorError) as error:
            raise unreadable(path, "safetensors", error) from error
        for name, entry in header.items():
            if name != "__metadata__":
                size = entry["data_offsets"][1] - entry["data_offsets"][0]
                total += size
                if name.endswith(("qweight", "scale")):
                    quantised += size
    return total, quantised
