"""Adapters out of all proportion to the base are refused before private text is read; ordinary ones pass."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.initial import initial_tensors
from fl_client.dp.magnitude import check_magnitude
from fl_client.model.quantised.layers import QuantExperts, QuantLinear
from fl_shared.errors import PolicyRefusal
from helpers.hostile_adapters import ATTACKS
from helpers.random_models import ARCHITECTURES, adapted_small

LIMIT = 10.0


def started(architecture: str, **how: object) -> AdaptedModel:
    """A small model at a run's seeded start."""
    adapted = adapted_small(architecture, **{"quantised": True, **how})  # type: ignore[arg-type]
    with torch.no_grad():
        for name, value in initial_tensors(adapted, 3).items():
            adapted.trainable[name].copy_(torch.from_numpy(value))
    return adapted


@pytest.mark.parametrize("how", [{}, {"quantised": False}, {"bits": 4}, {"core": True}], ids=str)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_start_of_a_run_and_ordinary_training_pass(architecture: str, how: dict[str, object]) -> None:
    """The seeded start, and factors about as large as training makes them."""
    adapted = started(architecture, **how)
    check_magnitude(adapted, LIMIT)
    ATTACKS["ordinary"](adapted, np.random.default_rng(3))
    check_magnitude(adapted, LIMIT)


@pytest.mark.parametrize("attack", [name for name in ATTACKS if "1e" in name])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_amplifiers_are_refused_by_name(architecture: str, attack: str) -> None:
    """Whatever makes roundings visible through huge factors; without a limit nothing is asked."""
    adapted = started(architecture)
    ATTACKS[attack](adapted, np.random.default_rng(3))
    with pytest.raises(PolicyRefusal, match=r"lora_B.* times as large as the base's weight, above 10"):
        check_magnitude(adapted, LIMIT)
    check_magnitude(adapted, math.inf)


@pytest.mark.parametrize("value", [1e3, math.nan])
def test_one_expert_and_the_head_count(value: float) -> None:
    """A single huge expert among many, and a head without a weight beneath."""
    for kind in ("lora_B_down", "classifier.weight"):
        adapted = started("mixtral")
        name = next(name for name in adapted.trainable if kind in name)
        with torch.no_grad():
            adapted.trainable[name][3] = value
        with pytest.raises(PolicyRefusal, match=kind.partition(".")[0]):
            check_magnitude(adapted, LIMIT)


def test_norms_are_those_of_the_dequantised_weights() -> None:
    """Of every linear layer and each expert, for int8 and int4, against the whole dequantised matrix."""
    for bits in (8, 4):
        adapted = started("deepseek_v3", bits=bits)
        check_magnitude(adapted, LIMIT)
        for path, layer in adapted.layers.items():
            base = layer.base_layer
            norms = {key.partition(path)[2]: value for key, value in adapted.base_norms.items() if f".{path}" in key}
            if isinstance(base, QuantLinear):
                torch.testing.assert_close(norms[""], base.weight_as(torch.float64).norm().reshape(1))
            elif isinstance(base, QuantExperts):
                for part in ("gate_up", "down"):
                    whole = base.weight_as(f"{part}_proj", torch.float64).flatten(1).norm(dim=1)
                    torch.testing.assert_close(norms[f"_{part}"], whole, rtol=1e-5, atol=1e-8)


def test_a_base_weight_of_zeros_is_measured_by_the_usual_one() -> None:
    """Upcycled bases hold zero matrices; a factor on one of them is not infinitely large."""
    adapted = started("olmoe", quantised=False)
    layer = next(layer for path, layer in adapted.layers.items() if path.endswith("q_proj"))
    with torch.no_grad():
        layer.get_parameter("base_layer.weight").zero_()
    check_magnitude(adapted, LIMIT)
