"""The engine's side of a comparison with the gradient oracle, and what lies between them."""

from __future__ import annotations

import torch

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.engine import DPEngine, EngineName
from fl_client.dp.records.records import Records
from fl_shared.privacy.mechanism import Mechanism
from helpers.gradient_oracle import Gradients, relative_error


def clipped_sum(
    adapted: AdaptedModel,
    records: Records,
    norm: float,
    *,
    frozen: frozenset[str] = frozenset(),
    engine: EngineName = "book",
    max_units: int = 64,
) -> Gradients:
    """What the engine holds before noise when every unit is sampled."""
    mechanism = Mechanism(noise_multiplier=1.0, sampling_probability=1.0, steps=1, clipping_norm=norm)
    made = DPEngine(
        adapted, records, mechanism,
        learning_rate=0.0, head_learning_rate=0.0, momentum=0.0, engine=engine, max_units=max_units,
        frozen=frozen,
    )  # fmt: skip
    try:
        made.accumulate(range(records.units))
        total = torch.from_numpy(made.optimizer.gather_sum())
    finally:
        made.close()
    names = {id(p): name for name, p in adapted.trainable.items()}
    sums, at = {}, 0
    for p in made.optimizer.params:
        sums[names[id(p)]] = total[at : at + p.numel()].view(p.shape)
        at += p.numel()
    made.optimizer.zero_grad(set_to_none=True)
    return sums


def group_errors(adapted: AdaptedModel, found: Gradients, wanted: Gradients) -> dict[str, float]:
    """Relative error of attention, shared experts, routed experts and head, each by itself."""
    assert set(found) == set(wanted)
    groups: dict[str, list[str]] = {}
    for name in wanted:
        groups.setdefault(adapted.groups[name], []).append(name)
    return {group: relative_error(found, wanted, names) for group, names in groups.items()}
