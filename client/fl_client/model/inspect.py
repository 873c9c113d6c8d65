"""What a model directory is: parameters, parameters that work on one token, bytes, digest."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fl_client.model.layout import (
    QUANTISATION_KEY,
    directory_digest,
    expert_modules,
    quantised_linears,
    read_config,
    skeleton,
    weight_files,
)

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
    """Read config and tensor headers; no weight is loaded. ModelError when the directory is unusable."""
    config = read_config(directory)
    model = skeleton(directory)
    parameters = sum(each.numel() for each in model.parameters())
    experts = expert_modules(model)
    routed = sum(p.numel() for module in experts.values() for p in module.parameters())
    # A text-only config names the counts differently by family; the fused tensors say how many experts there are.
    count = max((int(next(module.parameters()).shape[0]) for module in experts.values()), default=0)
    chosen = int(model.config.num_experts_per_tok) if count else 0  # type: ignore[union-attr,arg-type]  # MoE configs have it
    active = parameters - routed + (routed * chosen // count if count else 0)
    names = {f"{name}.weight" for name in quantised_linears(model)}
    quantisable = routed + sum(dict(model.named_parameters())[name].numel() for name in names)
    on_disk, quantised_bytes = _bytes_on_disk(directory)
    settings = config.get(QUANTISATION_KEY)
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
        with safe_open(path, framework="pt") as source:
            for name in source.keys():  # noqa: SIM118  # safe_open is no mapping
                piece = source.get_slice(name)
                size = _ELEMENT_BYTES[piece.get_dtype()]
                for extent in piece.get_shape():
                    size *= extent
                total += size
                if name.endswith(("qweight", "scale")):
                    quantised += size
    return total, quantised


_ELEMENT_BYTES = {"I8": 1, "U8": 1, "BOOL": 1, "F16": 2, "BF16": 2, "F32": 4, "I32": 4, "F64": 8, "I64": 8}
