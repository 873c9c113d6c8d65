"""Opacus' hooks and ghost clipping under a bfloat16 base model, whose LoRA factors stay float32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.engine import precision_of
from fl_client.dp.layers.lora import LoraExperts
from helpers.clipped import clipped_sum, group_errors
from helpers.random_models import ARCHITECTURES, adapted_small, cast_base, units_of_records

torch.set_num_threads(1)
SIZES = [[5], [9], [1], [6], [7]]  # one record for each unit: ghost clipping knows nothing else
# bfloat16 rounds by up to 2^-9 = 0.2 % of a value, some hundred times on the way to a gradient, and softmax and norms
# enlarge what went before. The book rounds the factors too, the hooks multiply by exact ones: they part by 0.5 to 4 %.
# A gradient that is missing or doubled is off by 50 % and more.
TOLERANCE = 0.1


def _by_position(layer: LoraExperts, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Experts by position in the record: a router's near-tie that rounding flips would be the whole difference."""
    hidden, chosen, weights = args
    packed = layer.scope.packed  # hooks get one record at a time
    at = torch.arange(hidden.shape[0], device=hidden.device) if packed is None else packed.positions
    return hidden, torch.stack([at % 8, (at + 3) % 8], 1).to(chosen.dtype), weights


def half(adapted: AdaptedModel) -> AdaptedModel:
    """The base in bfloat16, its scales and the planned tensors in float32, as on CUDA; routing is fixed."""
    backbone = cast_base(adapted.module.backbone, torch.bfloat16)
    for module in backbone.modules():
        if isinstance(module, LoraExperts):
            module.register_forward_pre_hook(_by_position)
    return adapted


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("core", [False, True], ids=["factors", "cores"])
@pytest.mark.parametrize("bits", [0, 8], ids=["float", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_opacus_agrees_with_the_book_in_bfloat16(architecture: str, bits: int, *, core: bool) -> None:
    """Hooks and ghost run on a bfloat16 model and give the book's clipped sum, up to rounding."""
    adapted = half(adapted_small(architecture, quantised=bits > 0, core=core))
    for parameter in adapted.trainable.values():
        parameter.data *= 0.3  # a full-size random adapter sharpens attention until it enlarges roundings tenfold
    assert precision_of(adapted) == torch.bfloat16
    records = units_of_records(SIZES)
    frozen = frozenset(name for name, parameter in adapted.trainable.items() if not parameter.requires_grad)
    wanted = clipped_sum(adapted, records, 2.0, frozen=frozen)
    for engine in ("hooks", "ghost"):
        found = clipped_sum(adapted, records, 2.0, frozen=frozen, engine=engine)
        errors = group_errors(adapted, found, wanted)
        assert max(errors.values()) < TOLERANCE, (engine, errors)
