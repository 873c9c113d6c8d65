"""Clipped, summed gradients against stock Hugging Face, one record at a time."""

from __future__ import annotations

import dataclasses
import gc
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_client.dp import engine as engine_module
from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.engine import DPEngine, EngineName, precision_of
from fl_client.dp.layers.book import GradientBook
from fl_client.dp.layers.lora import LoraExperts
from fl_client.dp.layers.routing import Routing
from fl_client.dp.records.packing import FULL, Packed, pack
from fl_client.dp.records.records import Records
from fl_client.dp.rounding import slack
from fl_client.tasks.classification import CrossEntropy
from helpers.broken_books import PerTokenBook, UnclippedExpertsBook
from helpers.clipped import clipped_sum, group_errors
from helpers.gradient_oracle import GradientOracle, Gradients, relative_error
from helpers.random_models import ARCHITECTURES, adapted_small, float_model, small_config, units_of_records

torch.set_num_threads(1)
TOLERANCE = 1e-5
# Units of one to four records, records of one to nine tokens: every micro-batch is padded.
SIZES = [[5, 3], [9], [1], [2, 6, 4, 1], [7]]


def expert_counts(monkeypatch: pytest.MonkeyPatch) -> list[np.ndarray]:
    """Collects, for every expert layer that runs, how many rows each expert got."""
    seen: list[np.ndarray] = []
    first = Routing.__init__

    def spy(self: Routing, top_k_index: Tensor, num_experts: int, *rest: Any) -> None:
        first(self, top_k_index, num_experts, *rest)
        seen.append(np.bincount(self._expert.numpy(), minlength=num_experts))

    monkeypatch.setattr(Routing, "__init__", spy)
    return seen


@pytest.mark.parametrize("bits", [0, 8, 4], ids=["float", "int8", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_clipped_sum_equals_the_loop(architecture: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """For top-k 1 to 4, every LoRA group and the head agree with the batch-size-1 loop to 1e-5, some units clipped."""
    counts = expert_counts(monkeypatch)
    for top_k in (1, 2, 3, 4):
        adapted = adapted_small(architecture, quantised=bits > 0, bits=bits, top_k=top_k)
        oracle = GradientOracle(adapted, small_config(architecture, top_k=top_k))
        records = units_of_records(SIZES, seed=top_k)
        _, norms = oracle.clipped_sum(records, 1.0)
        norm = float(np.median(norms))
        wanted, _ = oracle.clipped_sum(records, norm)
        errors = group_errors(adapted, clipped_sum(adapted, records, norm), wanted)
        assert {"attention", "routed_experts", "head"} <= set(errors)
        assert max(errors.values()) < TOLERANCE, (top_k, errors)
    assert counts


def _forced(positions: Callable[[int], Tensor]) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    """A hook that sends every token to expert 2, and one more expert by position: expert 0 sees only position 8."""

    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        hidden, _, weights = args
        position = positions(hidden.shape[0])
        second = torch.where(position == 8, 0, 1 + 2 * (position % 2))  # 1 or 3; never 4 to 7
        return hidden, torch.stack([torch.full_like(second, 2), second], 1), weights

    return hook


@pytest.mark.parametrize("bits", [0, 8, 4], ids=["float", "int8", "int4"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_experts_with_no_one_and_all_tokens(architecture: str, bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Routing by hand: an expert with every token, one with a single real token, several with none."""
    counts = expert_counts(monkeypatch)
    adapted = adapted_small(architecture, quantised=bits > 0, bits=bits)
    oracle = GradientOracle(adapted, small_config(architecture))
    backbone = adapted.module.backbone
    forced = [name for name, module in backbone.named_modules() if isinstance(module, LoraExperts)]

    def packed(_: int) -> Tensor:
        assert adapted.scope.packed is not None
        return adapted.scope.packed.positions

    for model, positions in ((backbone, packed), (oracle.base, torch.arange)):
        for name in forced:
            model.get_submodule(name).register_forward_pre_hook(_forced(positions))
    records = units_of_records(SIZES)  # only the record of 9 tokens has a position 8
    wanted = [oracle.unit_gradient(records, unit) for unit in range(records.units)]
    found = clipped_sum(adapted, records, 1e9)
    summed = {name: torch.stack([unit[name] for unit in wanted]).sum(0) for name in wanted[0]}
    errors = group_errors(adapted, found, summed)
    assert max(errors.values()) < TOLERANCE, errors
    rows = counts[-1]
    assert rows[2] == rows.sum() / 2  # all tokens
    assert (rows[4:] == 0).all()  # none
    assert rows[0] == 1  # position 8 is in one record alone, and filler goes through no expert


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_opacus_agrees(architecture: str, engine: EngineName) -> None:
    """Opacus' own hooks and ghost clipping, fed through our samplers, give the book's clipped sum."""
    adapted = adapted_small(architecture, quantised=True)
    records = units_of_records(SIZES if engine == "hooks" else [[5], [9], [1], [6], [7]])
    norm = 2.0
    found = clipped_sum(adapted, records, norm)
    errors = group_errors(adapted, clipped_sum(adapted, records, norm, engine=engine), found)
    assert max(errors.values()) < TOLERANCE, errors


class _RolledBook(GradientBook):
    """Expert rows booked to the neighbour's unit."""

    def __init__(self, batch: Packed) -> None:
        super().__init__(batch)
        self.unit_of_token = self.unit_of_token.roll(batch.runs[0][0])


@pytest.mark.parametrize("broken", [PerTokenBook, UnclippedExpertsBook, _RolledBook])
def test_the_comparison_notices_a_wrong_engine(broken: type[GradientBook], monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: per-token clipping, experts left out of the norm and rolled ids are all off by more than 1e-2."""
    adapted = adapted_small("deepseek_v3", quantised=True)
    oracle = GradientOracle(adapted, small_config("deepseek_v3"))
    records = units_of_records(SIZES)
    norm = float(np.median(oracle.clipped_sum(records, 1.0)[1])) / 4
    wanted, _ = oracle.clipped_sum(records, norm)
    monkeypatch.setattr(engine_module, "GradientBook", broken)
    errors = group_errors(adapted, clipped_sum(adapted, records, norm), wanted)
    assert max(errors.values()) > 1e-2, errors


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_unit_sees_another(architecture: str) -> None:
    """Changing one unit's texts and labels, at the same padded length, leaves every other unit's gradient alone."""
    adapted = adapted_small(architecture, quantised=True)
    records, other = units_of_records(SIZES), units_of_records(SIZES, seed=9)
    mixed = Records(
        tuple(other.ids[r] if r in records.of_unit[1] else row for r, row in enumerate(records.ids)),
        np.where(np.isin(np.arange(len(records.ids)), records.of_unit[1]), (records.targets + 1) % 5, records.targets),
        records.of_unit, 0,
    )  # fmt: skip
    for unit in (0, 2, 3, 4):
        apart = relative_error(_one_unit(adapted, mixed, unit), _one_unit(adapted, records, unit))
        assert apart < 1e-6, unit
    assert relative_error(_one_unit(adapted, mixed, 1), _one_unit(adapted, records, 1)) > 1e-2


def _one_unit(adapted: AdaptedModel, records: Records, unit: int) -> Gradients:
    """One unit's gradient from a micro-batch that holds all units."""
    book = _book(adapted, records)
    weights = torch.zeros(records.units)
    weights[unit] = 1.0
    names = {id(p): name for name, p in adapted.trainable.items()}
    return {names[id(p)]: value for p, value in book.weighted_sums(weights)}


def _book(adapted: AdaptedModel, records: Records) -> GradientBook:
    return engine_module.book_of(adapted, pack(records, range(records.units), torch.device("cpu")))


def test_a_loss_over_the_batch_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: a loss that is divided by the batch's tokens, as `labels=` does, lets units see each other."""
    adapted = adapted_small("qwen3_moe", quantised=False)
    records = units_of_records(SIZES)
    longer = units_of_records([[5, 3], [9, 9, 9], [1], [2, 6, 4, 1], [7]])
    own = dataclasses.replace(longer, ids=tuple(
        records.ids[records.of_unit[0][i]] if i < 2 else row for i, row in enumerate(longer.ids)
    ), targets=np.concatenate([records.targets[:2], longer.targets[2:]]))  # fmt: skip
    assert relative_error(_one_unit(adapted, own, 0), _one_unit(adapted, records, 0)) < 1e-5

    def over_batch(_: CrossEntropy, logits: Tensor, rows: Tensor) -> Tensor:
        return F.cross_entropy(logits, rows, reduction="none") / len(rows)

    monkeypatch.setattr(CrossEntropy, "losses", over_batch)
    assert relative_error(_one_unit(adapted, own, 0), _one_unit(adapted, records, 0)) > 1e-2


def test_the_oracle_is_the_model() -> None:
    """With a zero factor B the oracle's merged model gives stock Hugging Face's hidden states."""
    config = small_config("olmoe")
    adapted = adapted_small("olmoe", quantised=False)
    stock = float_model(config)
    ids = torch.tensor([[3, 5, 7]])
    oracle = GradientOracle(adapted, config)
    wanted = stock.get_submodule("model")(input_ids=ids).last_hidden_state
    found = torch.func.functional_call(oracle.base, oracle._weights, kwargs={"input_ids": ids}).last_hidden_state
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", ["deepseek_v3", "qwen2_moe"])
def test_one_unit_changes_the_sum_by_no_more_than_is_paid_for(architecture: str, dtype: torch.dtype) -> None:
    """Norm and context together: adding a unit to 40 others moves the computed sum by at most C (1 + slack)."""
    adapted = adapted_small(architecture, quantised=True)
    planned = {id(p) for p in adapted.trainable.values()}
    for t in [*adapted.module.backbone.parameters(), *adapted.module.backbone.buffers()]:
        if t.is_floating_point() and id(t) not in planned:
            t.data = t.data.to(dtype)
    records = units_of_records([[3 + 5 * unit % 23] for unit in range(41)])
    paid, norm = slack(units=41, rows=2 * FULL), 0.05
    assert precision_of(adapted) == dtype
    whole = flat(clipped_sum(adapted, records, norm))
    for unit in range(0, 41, 4):
        others = tuple(rows for number, rows in enumerate(records.of_unit) if number != unit)
        without = flat(clipped_sum(adapted, dataclasses.replace(records, of_unit=others), norm))
        change = float(torch.linalg.vector_norm(whole - without)) / norm
        assert change <= 1 + paid
        assert change > 0.99  # every unit here is clipped


def flat(sums: Gradients) -> Tensor:
    """All coordinates in float64."""
    return torch.cat([sums[name].reshape(-1).double() for name in sorted(sums)])


def live_tensors() -> int:
    """Tensors that Python still reaches after a full collection."""
    gc.collect()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sum(issubclass(type(found), Tensor) for found in gc.get_objects())


@pytest.mark.parametrize("architecture", ["deepseek_v3", "mixtral"])
def test_a_step_leaves_nothing_in_memory(architecture: str) -> None:
    """Five more passes keep as many tensors alive as the first did: the book is in no cycle with the graph."""
    adapted = adapted_small(architecture, quantised=True)
    records = units_of_records(SIZES)
    clipped_sum(adapted, records, 1.0)
    before = live_tensors()
    for _ in range(5):
        clipped_sum(adapted, records, 1.0)
    assert live_tensors() == before


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("out"), MemoryError()], ids=["torch", "python"])
def test_running_out_of_memory_halves_the_micro_batch_and_changes_nothing(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    """When more than one unit never fits, before or after the backward pass, the sum is still the whole one."""
    adapted = adapted_small("qwen3_moe", quantised=True)
    records = units_of_records(SIZES)
    wanted = clipped_sum(adapted, records, 1.0)
    passed, sizes = DPEngine.forward_backward, []

    def scarce(self: DPEngine, batch: Packed) -> None:
        sizes.append(batch.units)
        if batch.units > 2:
            raise error
        passed(self, batch)
        if batch.units > 1:
            raise error

    monkeypatch.setattr(DPEngine, "forward_backward", scarce)
    found = clipped_sum(adapted, records, 1.0)
    assert sizes[0] > 2
    assert sizes.count(1) == len(SIZES)
    assert relative_error(found, wanted) < TOLERANCE
