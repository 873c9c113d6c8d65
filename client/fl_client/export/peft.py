"""Write an adapter as stock PEFT reads it: `adapter_model.safetensors` and `adapter_config.json`.

Routed experts become PEFT's `target_parameters`: factor A `[E r, in]` with experts outermost, factor B `[out, r E]`
with experts innermost (`peft.tuners.lora.layer.ParamWrapper`). Two parameters of one module are nested wrappers, so
the first one's factors lie under `base_layer`. Shared experts are named by their weights, also `target_parameters`:
where PEFT meets `gate_proj` or `down_proj` among the `target_modules` of some families, it takes them for routed
experts of an older transformers, leaves the shared ones out and doubles a rank (docs/decisions/0095). A core (Fed-SB)
is multiplied into its factor B. The task's head is ours and lies in `head.safetensors`, what it needs beside its
weights in `head.json`.

PEFT itself loads what was written onto the base's shapes; a folder that it refuses is not left behind.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from peft import PeftModel
from safetensors.numpy import save_file
from transformers import AutoModelForCausalLM

from fl_client.dp.adapt import HEAD, PREFIX, AdaptedModel
from fl_client.dp.layers.lora import ADAPTER
from fl_client.dp.start import adapted_for, load_offset
from fl_client.model.load import LoadedModel
from fl_client.site.files import filled_or_gone
from fl_client.tasks.registry import task_of
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ModelError

_NESTED = {"gate_up": "base_layer.", "down": ""}


def write_peft(
    adapted: AdaptedModel,
    values: Mapping[str, NDArray[np.float32]],
    directory: Path,
    *,
    head_metadata: Mapping[str, Any],
    digest: str,
) -> None:
    """Write `values` (every trainable tensor) into `directory`, which is made when it is not there.

    Args:
        head_metadata: what the head needs beside its weights, for `head.json`.
        digest: the base model's.

    Raises:
        ModelError: `directory` holds files or cannot be written, or stock PEFT does not load what was written onto
            this base. Nothing is left behind then.
    """
    values = _without_cores(values)
    factors: dict[str, NDArray[np.float32]] = {}
    modules: list[str] = []
    parameters: list[str] = []
    for path in adapted.layers:
        names = [name for name in values if name.startswith(f"{PREFIX}{path}.")]
        group = adapted.groups[names[0]]
        if group == "routed_experts":
            parameters += [f"{path}.gate_up_proj", f"{path}.down_proj"]
        elif group == "shared_experts":
            parameters.append(f"{path}.weight")
        else:
            modules.append(path)
        for name in names:
            stock, value = _stock(name, values[name])
            factors[stock] = np.ascontiguousarray(value)
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
    head = {name.removeprefix(HEAD): np.ascontiguousarray(v) for name, v in values.items() if name.startswith(HEAD)}
    with filled_or_gone(directory):
        save_file(head, directory / "head.safetensors")
        (directory / "head.json").write_text(
            json.dumps({**head_metadata, "base_model": digest}, indent=2) + "\n", encoding="utf-8"
        )
        save_file(factors, directory / "adapter_model.safetensors", metadata={"format": "pt"})
        (directory / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        _require_loadable(adapted.module.backbone, factors, directory)


def _require_loadable(backbone: Any, factors: Mapping[str, NDArray[np.float32]], directory: Path) -> None:
    """Let stock PEFT load `directory` onto the base's shapes: every factor must arrive, and no other be expected."""
    kind = str(backbone.config.model_type)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(backbone.config)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # what matters of them is looked at below
            loaded = PeftModel.from_pretrained(base, directory, low_cpu_mem_usage=True)
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = str(error).strip().splitlines()[-1].strip()
        raise _unloadable(kind, reason) from error
    expected = {
        (name.replace(f".{ADAPTER}.", "."), tuple(value.shape))
        for name, value in loaded.named_parameters()
        if ".lora_" in name
    }
    for name, shape in sorted(expected ^ {(name, value.shape) for name, value in factors.items()}):
        problem = "has no value" if (name, shape) in expected else "is not read"
        raise _unloadable(kind, f"{name} of shape {shape} {problem}")


def _unloadable(kind: str, reason: str) -> ModelError:
    return ModelError(
        f"stock PEFT does not load this adapter of a {kind} model: {reason}",
        fix="use the run's own file with `fl-model evaluate`; a run without that target in [lora] targets can be "
        "exported",
    )


def _without_cores(values: Mapping[str, NDArray[np.float32]]) -> dict[str, NDArray[np.float32]]:
    """The same model without cores: `B (R A) = (B R) A`."""
    merged = {name: value for name, value in values.items() if ".lora_R" not in name}
    for name, core in values.items():
        if ".lora_R" in name:
            up = name.replace(".lora_R", ".lora_B")
            merged[up] = values[up] @ core
    return merged


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


def export_peft(model: LoadedModel, spec: RunSpec, offset: Mapping[str, NDArray[np.float32]], directory: Path) -> None:
    """Write seeded start + `offset` as a directory that stock PEFT loads onto the float model, plus the head."""
    task = task_of(spec)
    adapted = adapted_for(model, spec, task.objective)
    start = load_offset(adapted, spec, offset)
    write_peft(adapted, start, directory, head_metadata=task.head_metadata(), digest=model.digest)
    (directory / "spec.json").write_text(json.dumps(spec.to_dict(), indent=2) + "\n", encoding="utf-8")
