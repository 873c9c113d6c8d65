"""Write an adapter as stock PEFT reads it: `adapter_model.safetensors` and `adapter_config.json`.

Routed experts become PEFT's `target_parameters`: factor A `[E r, in]` with experts outermost, factor B `[out, r E]`
with experts innermost (`peft.tuners.lora.layer.ParamWrapper`). Two parameters of one module are nested wrappers, so
the first one's factors lie under `base_layer`. A core (Fed-SB) is multiplied into its factor B. The classification
head is ours and lies in `head.safetensors`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save_file

from fl_client.dp.adapt import HEAD, PREFIX, AdaptedModel

_NESTED = {"gate_up": "base_layer.", "down": ""}


def write_peft(
    adapted: AdaptedModel,
    values: Mapping[str, NDArray[np.float32]],
    directory: Path,
    *,
    labels: Sequence[str],
    digest: str,
) -> None:
    """Write `values` (every planned tensor) into `directory`, which is made when it is not there."""
    directory.mkdir(parents=True, exist_ok=True)
    values = _without_cores(values)
    factors: dict[str, NDArray[np.float32]] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for path in adapted.layers:
        names = [name for name in values if name.startswith(f"{PREFIX}{path}.")]
        if adapted.groups[names[0]] == "routed_experts":
            parameters += [f"{path}.gate_up_proj", f"{path}.down_proj"]
        else:
            modules.append(path)
        for name in names:
            stock, value = _stock(name, values[name])
            factors[stock] = np.ascontiguousarray(value)
    save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": adapted.lora.rank,
        "lora_alpha": adapted.lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "target_modules": modules,
        "target_parameters": parameters or None,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    head = {name.removeprefix(HEAD): np.ascontiguousarray(v) for name, v in values.items() if name.startswith(HEAD)}
    facts = {"labels": list(labels), "base_model": digest, "pooling": "mean over real tokens, standardised"}
    save_file(head, directory / "head.safetensors")
    (directory / "head.json").write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def _without_cores(values: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The same model without cores: `B (R A) = (B R) A`."""
    found = {name: value for name, value in values.items() if ".lora_R" not in name}
    for name, core in values.items():
        if ".lora_R" in name:
            up = name.replace(".lora_R", ".lora_B")
            found[up] = values[up] @ core
    return found


def _stock(name: str, value: NDArray[np.float32]) -> tuple[str, NDArray[np.float32]]:
    """PEFT's name and layout of one factor."""
    for part, nested in _NESTED.items():
        for factor in ("lora_A", "lora_B"):
            mark = f".{factor}_{part}.weight"
            if name.endswith(mark):
                stock = f"{name.removesuffix(mark)}.{nested}{factor}.weight"
                if factor == "lora_A":
                    return stock, value.reshape(-1, value.shape[-1])
                return stock, value.transpose(1, 2, 0).reshape(value.shape[1], -1)
    return name, value
