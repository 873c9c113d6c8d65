"""The oracle of the DP engine: stock Hugging Face, merged weights, one record at a time, clipping of its own.

It shares no layer, kernel or autograd function with the engine. The base is a float model with the same (dequantised)
weights; every adapted weight is replaced by `W + alpha/r B A` as a function of the factors, and plain autograd
differentiates through it. No padding, no batch, Hugging Face's eager loop over experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from transformers import AutoModel, PreTrainedConfig

from fl_client.dp.adapt import HEAD, PREFIX, AdaptedModel
from fl_client.dp.records.records import Records

Gradients = dict[str, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]


class GradientOracle:
    """Gradients of an adapted model by the slow way.

    Args:
        adapted: read for its weights, and for which of them are trained; its forward pass is never called.
        config: of the base, to build the stock model.
        loss: of the head's outputs `[1, ...]` and one record's targets `[1, ...]`; one number.
    """

    def __init__(self, adapted: AdaptedModel, config: PreTrainedConfig, loss: Loss = F.cross_entropy) -> None:
        self._loss = loss
        self._base: Any = AutoModel.from_config(config)
        self._base.set_experts_implementation("eager")
        self._base.eval()
        stored = dict(adapted.module.backbone.state_dict())
        self._weights = {name: _plain_weight(stored, name, have) for name, have in self._base.state_dict().items()}
        self._scale = adapted.lora.alpha / adapted.lora.rank
        self._mean, self._std = adapted.module.head.feature_mean, adapted.module.head.feature_std
        self._plan = {name: value.detach().clone() for name, value in adapted.trainable.items()}
        self._trained = [name for name, value in adapted.trainable.items() if value.requires_grad]

    @property
    def base(self) -> nn.Module:
        """The stock model, for hooks."""
        module: nn.Module = self._base
        return module

    def unit_gradient(self, records: Records, unit: int) -> Gradients:
        """Sum of the gradients of one unit's records, each by itself."""
        leaves = {name: value.clone() for name, value in self._plan.items()}
        for name in self._trained:
            leaves[name].requires_grad_()
        merged = {**self._weights, **self._merged(leaves)}
        total = torch.zeros(())
        for record in records.of_unit[unit]:
            ids = torch.tensor([records.ids[record]])
            hidden = functional_call(self._base, merged, kwargs={"input_ids": ids}).last_hidden_state
            features = (hidden.mean(1) - self._mean) / self._std
            logits = F.linear(features, leaves[f"{HEAD}weight"], leaves[f"{HEAD}bias"])
            total = total + self._loss(logits, torch.from_numpy(records.targets[[record]]))
        found = torch.autograd.grad(total, [leaves[name] for name in self._trained])
        return dict(zip(self._trained, found, strict=True))

    def clipped_sum(self, records: Records, norm: float) -> tuple[Gradients, list[float]]:
        """Sum over all units of gradients scaled to at most `norm`, and every unit's norm before that."""
        total: Gradients = {name: torch.zeros_like(self._plan[name], dtype=torch.float64) for name in self._trained}
        norms = []
        for unit in range(records.units):
            gradient = {name: value.double() for name, value in self.unit_gradient(records, unit).items()}
            size = torch.cat([value.flatten() for value in gradient.values()]).norm().item()
            norms.append(size)
            for name, value in gradient.items():
                total[name] += value * min(1.0, norm / size)
        return total, norms

    def _merged(self, leaves: Gradients) -> Gradients:
        """Adapted weight's name in the base to `W + alpha/r B A`, with a core to `W + alpha/r B R A`."""
        merged = {}
        for name, a in leaves.items():
            for part, weight in (("", ".weight"), ("_gate_up", ".gate_up_proj"), ("_down", ".down_proj")):
                if name.endswith(f".lora_A{part}.weight"):
                    b = leaves[name.replace(".lora_A", ".lora_B")]
                    core = leaves.get(name.replace(".lora_A", ".lora_R"))
                    b = b if core is None else b @ core
                    path = name.removeprefix(PREFIX).removesuffix(f".lora_A{part}.weight") + weight
                    merged[path] = self._weights[path] + self._scale * (b @ a)
        return merged


def _plain_weight(stored: Gradients, name: str, stock: Tensor) -> Tensor:
    """A base weight by its stock name, from under LoRA layers and int8 or int4, dequantised group by group."""
    module, _, leaf = name.rpartition(".")
    for path in (f"{module}.{leaf}", f"{module}.base_layer.{leaf}"):
        if path in stored:
            return stored[path].detach().clone()
        join = path.removesuffix("weight") if leaf == "weight" else f"{path}_"
        if f"{join}qweight" in stored:
            values, scale = stored[f"{join}qweight"], stored[f"{join}scale"]
            if values.dtype == torch.uint8:
                values = _levels(values, stock.shape[-1])
            groups = [part.float() * scale[..., i : i + 1] for i, part in enumerate(values.split(128, dim=-1))]
            return torch.cat(groups, dim=-1)
    raise KeyError(name)


def _levels(packed: Tensor, inputs: int) -> Tensor:
    """int4 levels, one input after another: in each group byte j holds input j low and input j + ceil(L / 2) high."""
    columns, at = [], 0
    for first in range(0, inputs, 128):
        length = min(128, inputs - first)
        half = (length + 1) // 2
        nibbles = [packed[..., at + j % half].long() >> (0 if j < half else 4) & 15 for j in range(length)]
        columns += [torch.where(nibble < 8, nibble, nibble - 16) for nibble in nibbles]
        at += half
    return torch.stack(columns, dim=-1)


def relative_error(found: Gradients, wanted: Gradients, names: list[str] | None = None) -> float:
    """`|found - wanted| / |wanted|` over the named tensors together."""
    chosen = list(wanted) if names is None else names
    apart = torch.cat([(found[n].double() - wanted[n].double()).flatten() for n in chosen]).norm()
    return float(apart / torch.cat([wanted[n].double().flatten() for n in chosen]).norm())
