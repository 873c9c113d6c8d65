"""Adapters that a coordinator might send to make one unit change how others are computed, and what they achieve."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from fl_client.agent.evaluation import sensitivity_of
from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.audit.canaries import worst_case_adapter
from fl_client.dp.engine import book_of, precision_of
from fl_client.dp.kernels import independent_rows
from fl_client.dp.records.packing import cut, pack
from fl_client.dp.records.records import Records
from helpers.clipped import clipped_sum

Attack = Callable[[AdaptedModel, np.random.Generator], None]


def _cancelling(kind: str, size: float) -> Attack:
    """Rank rows p, q and -(p + q) cancel exactly in one order of additions, and `size` lets the rest be seen."""

    def write(adapted: AdaptedModel, rng: np.random.Generator) -> None:
        worst_case_adapter(adapted, rng)
        names = [name for name in adapted.trainable if kind in name and ".lora_A" in name]
        name = names[len(names) // 2]
        a, b = adapted.trainable[name], adapted.trainable[name.replace(".lora_A", ".lora_B")]
        with torch.no_grad():
            p, q = (torch.from_numpy(rng.normal(0, 1, a[..., 0, :].shape)).to(a) for _ in range(2))
            a.zero_()
            a[..., 0, :], a[..., 1, :], a[..., 2, :] = p, q, -(p + q)
            b.zero_()
            b[..., :3] = size * torch.from_numpy(rng.normal(0, 1, (*b.shape[:-1], 1))).to(b)

    return write


def _scaled(scale: float) -> Attack:
    return lambda adapted, rng: worst_case_adapter(adapted, rng, scale=scale)


def _amplified(kind: str, size: float) -> Attack:
    """A random adapter whose factors B of one kind are huge: every rounding of what they get is multiplied."""

    def write(adapted: AdaptedModel, rng: np.random.Generator) -> None:
        worst_case_adapter(adapted, rng)
        with torch.no_grad():
            for name, parameter in adapted.trainable.items():
                if kind in name and ".lora_B" in name:
                    parameter.mul_(size)

    return write


ATTACKS: dict[str, Attack] = {
    "ordinary": _scaled(0.05),
    "large": _scaled(1.0),
    "huge": _scaled(1e3),
    "cancelling attention 1e7": _cancelling("o_proj", 1e7),
    "cancelling attention 1e3": _cancelling("o_proj", 1e3),
    "cancelling experts 1e7": _cancelling("experts", 1e7),
    "amplified attention 1e4": _amplified("self_attn", 1e4),
    "amplified experts 1e5": _amplified("experts", 1e5),
    "amplified experts 1e30": _amplified("experts", 1e30),
}


def company(
    rng: np.random.Generator, *, units: int, vocabulary: int, classes: int, low: int, high: int, longer: int
) -> Records:
    """`units` short records, and one longer record last."""
    lengths = [*rng.integers(low, high + 1, units).tolist(), longer]
    return Records(
        tuple(tuple(int(i) for i in rng.integers(0, vocabulary, n)) for n in lengths),
        rng.integers(0, classes, len(lengths)),
        tuple(np.array([unit]) for unit in range(len(lengths))),
        0,
    )


def without_last(records: Records) -> Records:
    """The neighbouring data set."""
    return dataclasses.replace(records, of_unit=records.of_unit[:-1])


def change_of_sum(adapted: AdaptedModel, records: Records, norm: float, paid: float) -> float:
    """How far the last unit moves the clipped sum, over what is paid: at most 1 if the guarantee holds."""
    whole, rest = (clipped_sum(adapted, each, norm, max_units=128) for each in (records, without_last(records)))
    squared = sum(float((whole[name].double() - rest[name].double()).square().sum()) for name in whole)
    return math.sqrt(squared) / (norm * (1 + paid))


def contributions(adapted: AdaptedModel, records: Records) -> list[list[Tensor]]:
    """Of each unit its norm and everything that it adds, from micro-batches as a step cuts them."""
    device = next(iter(adapted.trainable.values())).device
    found: dict[int, list[Tensor]] = {}
    with independent_rows(device, precision_of(adapted)):
        for chosen in cut(records, range(records.units), heights=adapted.heights):
            book = book_of(adapted, pack(records, chosen, device, heights=adapted.heights))
            norms = book.norms()
            for place, unit in enumerate(chosen):
                found[unit] = [norms[place], *book.rows_of(place)]
    return [found[unit] for unit in range(records.units)]


def logits(adapted: AdaptedModel, records: Records) -> Tensor:
    """Float32 `[units, C]`, as `predict` computes them."""
    device = next(iter(adapted.trainable.values())).device
    found: dict[int, Tensor] = {}
    with torch.no_grad(), independent_rows(device, precision_of(adapted)):
        for chosen in cut(records, range(records.units), heights=adapted.heights):
            batch = pack(records, chosen, device, heights=adapted.heights)
            rows = adapted.module.packed(batch)
            found |= {chosen[unit]: row for unit, row in zip(batch.unit_of_record.tolist(), rows, strict=True)}
    return torch.stack([found[unit] for unit in range(records.units)])


def same_bits(one: Tensor, other: Tensor) -> bool:
    """Equal bit for bit, NaN included."""
    return one.shape == other.shape and _bytes(one) == _bytes(other)


def _bytes(values: Tensor) -> bytes:
    return values.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def is_bitwise(adapted: AdaptedModel, records: Records) -> bool:
    """Whether every other unit contributes, and is answered, to the bit the same without the last one."""
    rest = without_last(records)
    pairs = zip(contributions(adapted, records), contributions(adapted, rest), strict=False)
    answers = logits(adapted, records)[:-1], logits(adapted, rest)
    return same_bits(*answers) and all(all(map(same_bits, mine, alone)) for mine, alone in pairs)


def change_of_evaluation(adapted: AdaptedModel, records: Records) -> float:
    """How far the last unit moves the sum of evaluation vectors, over the root of three that is paid."""
    from fl_client.agent.evaluation import unit_vectors
    from fl_client.data.units import UnitData
    from fl_client.tasks.classification import Classification

    sums = []
    (classes,) = adapted.module.head.shape
    task = Classification(tuple(map(str, range(classes))), 8)
    for each in (records, without_last(records)):
        count = each.units
        data = UnitData(
            ("",) * count, tuple(task.labels[row] for row in each.targets[:count]), np.arange(count), count, "f" * 64
        )
        sums.append(unit_vectors(task, logits(adapted, each).float().numpy(), data).sum(0))
    return float(np.linalg.norm(sums[0] - sums[1])) / sensitivity_of(task)
