"""Which routed experts the private data reached in a round: a figure for the site alone, as private as the data."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fl_client.dp.adapt import AdaptedModel


class ExpertCoverage:
    """Notes, before noise is added, which experts have a gradient. The noise reaches all of them, every step."""

    def __init__(self, adapted: AdaptedModel) -> None:
        self._layers: dict[str, list[nn.Parameter]] = {}
        self._reached: dict[str, Tensor] = {}
        for name, parameter in adapted.trainable.items():
            # Factor A has no gradient as long as B is zero, so it tells nothing about the tokens.
            if adapted.groups[name] == "routed_experts" and parameter.requires_grad and ".lora_A" not in name:
                self._layers.setdefault(name.partition(".lora_")[0], []).append(parameter)
        for layer, parameters in self._layers.items():
            self._reached[layer] = torch.zeros(parameters[0].shape[0], dtype=torch.bool)

    def note(self) -> None:
        """Look at the summed gradients of one logical step."""
        for layer, parameters in self._layers.items():
            if bool(self._reached[layer].all()):
                continue
            trained: list[Any] = list(parameters)  # Opacus keeps the sum as an attribute of the parameter
            for total in (p.summed_grad for p in trained if p.summed_grad is not None):
                self._reached[layer] |= (total != 0).flatten(1).any(1).cpu()

    def report(self) -> dict[str, int]:
        """Number of routed experts in all adapted layers, and of those that a gradient reached."""
        return {
            "experts": sum(reached.numel() for reached in self._reached.values()),
            "experts_reached": sum(int(reached.sum()) for reached in self._reached.values()),
        }
