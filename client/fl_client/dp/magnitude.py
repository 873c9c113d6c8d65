"""How large an adapter is against the base's own weights, factor by factor: a site's second lock on what it is sent.

Huge factors are what makes roundings visible, and no training under clipping and noise makes them. The guarantee does
not rest on this (docs/decisions/0022); it keeps an adapter that has no other use from being trained at all.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from fl_client.dp.adapt import HEAD, PREFIX, AdaptedModel
from fl_client.dp.layers.lora import LoraExperts
from fl_client.model.quantised.layers import QuantExperts, QuantLinear
from fl_client.model.quantised.tensor import dequantise
from fl_shared.errors import PolicyRefusal


def check_magnitude(adapted: AdaptedModel, limit: float) -> None:
    """Refuse an adapter with a factor whose L2 norm is more than `limit` times that of the weight it adapts.

    Experts are compared one by one. A weight smaller than the median one stands for that: some bases have zeros. The
    head has no weight beneath; its root mean square may be `limit`.

    Raises:
        PolicyRefusal: with the factor's name and how large it is.
    """
    if math.isinf(limit):
        return
    norms = adapted.base_norms or _base_norms(adapted)
    adapted.base_norms = norms
    usual = statistics.median(float(value.median()) for value in norms.values())
    for name, value in adapted.trainable.items():
        factor = value.detach().double()
        if name.startswith(HEAD):
            ratio = float(factor.square().mean().sqrt())
        else:
            size = factor.flatten(1).norm(dim=1) if factor.ndim == 3 else factor.norm().reshape(1)
            ratio = float((size / norms[_weight_of(name)].to(size).clamp(min=usual)).max())
        if not ratio <= limit:
            raise PolicyRefusal(
                f"the adapter's {name} is {ratio:.3g} times as large as the base's weight, above {limit:g}",
                fix="start the run again from an earlier adapter, or ask the site to raise [policy] max_adapter_norm",
            )


def _weight_of(name: str) -> str:
    """What a factor adapts: `layers.0.mlp.experts` and `gate_up`, say."""
    path, _, factor = name.partition(".lora_")
    return f"{path}{factor[1:].removesuffix('.weight')}"


def _base_norms(adapted: AdaptedModel) -> dict[str, Tensor]:
    """L2 norm of each adapted weight, of each expert's `[E]`, by `_weight_of` its factors."""
    return {f"{PREFIX}{path}{part}": norm for path, layer in adapted.layers.items() for part, norm in _weights(layer)}


@torch.no_grad()
def _weights(layer: nn.Module) -> Iterator[tuple[str, Tensor]]:
    base: Any = layer.base_layer
    if not isinstance(layer, LoraExperts):
        whole = base.weight_as(torch.float32) if isinstance(base, QuantLinear) else base.weight
        yield "", whole.double().norm().reshape(1)
        return
    for part in ("gate_up", "down"):
        if isinstance(base, QuantExperts):
            quantised, scale, inputs = base._stored(f"{part}_proj")
            weights = (
                dequantise(own, factor, base.group, torch.float32, inputs)
                for own, factor in zip(quantised, scale, strict=True)
            )
        else:
            weights = iter(getattr(base, f"{part}_proj"))
        yield f"_{part}", torch.stack([weight.double().norm() for weight in weights])
