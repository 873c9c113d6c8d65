"""What a unit contributes does not depend on who shares its step, whatever adapter the coordinator sends."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_client.dp import invariance
from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.checks import check_layers
from fl_client.dp.invariance import check_invariance
from fl_client.dp.layers import lora as lora_layers
from fl_client.dp.layers.attention import causal
from fl_client.dp.layers.routing import Routing
from fl_client.dp.records.packing import FULL, HEIGHTS, cut, height, heights_for, tokens_of
from fl_client.dp.rounding import slack
from fl_client.model.quantised.matmul import grouped_rows
from fl_shared.errors import EngineError
from helpers.clipped import clipped_sum
from helpers.hostile_adapters import (
    ATTACKS,
    change_of_evaluation,
    change_of_sum,
    company,
    contributions,
    is_bitwise,
)
from helpers.random_models import ARCHITECTURES, adapted_small, cast_base, units_of_records

torch.set_num_threads(1)


def attacked(architecture: str, attack: str, dtype: torch.dtype, **how: bool) -> AdaptedModel:
    """A small model of the family under an attacker's adapter."""
    adapted = adapted_small(architecture, **{"quantised": True, **how})
    cast_base(adapted.module.backbone, dtype)
    ATTACKS[attack](adapted, np.random.default_rng(3))
    return adapted


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_adapter_lets_a_unit_change_how_others_are_computed(
    architecture: str, attack: str, dtype: torch.dtype
) -> None:
    """A longer record beside twenty short ones, whose height is another with it: bits of the others, sum and
    evaluation, as the noise assumes."""
    adapted = attacked(architecture, attack, dtype)
    records = company(np.random.default_rng(5), units=20, vocabulary=96, classes=5, low=3, high=9, longer=31)
    assert is_bitwise(adapted, records)
    assert change_of_sum(adapted, records, 0.5, slack(units=21, rows=2 * FULL)) <= 1
    assert change_of_evaluation(adapted, records) <= 1 + 1e-12


@pytest.mark.parametrize("how", [{"quantised": False}, {"core": True}], ids=["float", "core"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_nor_on_float_bases_and_cores(architecture: str, how: dict[str, bool]) -> None:
    """Experts without quantisation, and cores between frozen factors, keep to it as well."""
    adapted = attacked(architecture, "large", torch.float32, **how)
    records = company(np.random.default_rng(6), units=20, vocabulary=96, classes=5, low=3, high=9, longer=31)
    assert is_bitwise(adapted, records)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("architecture", "rank", "core"), [("mixtral", 5, False), ("deepseek_v3", 9, False), ("qwen3_moe", 7, True)]
)
def test_nor_at_ranks_whose_products_libraries_treat_otherwise(
    architecture: str, rank: int, core: bool, dtype: torch.dtype
) -> None:
    """A unit of one token moves all others by one place; narrow products of 5, 7 or 9 columns would notice."""
    adapted = adapted_small(architecture, quantised=True, rank=rank, core=core)
    cast_base(adapted.module.backbone, dtype)
    ATTACKS["large"](adapted, np.random.default_rng(3))
    records = company(np.random.default_rng(5), units=20, vocabulary=96, classes=5, low=3, high=9, longer=1)
    check_invariance(adapted, vocabulary=96, seed=1)  # and such a rank is not refused
    assert adapted.heights == HEIGHTS
    assert is_bitwise(adapted, records)
    assert core or change_of_sum(adapted, records, 0.5, slack(units=21, rows=2 * FULL)) <= 1


def test_units_of_several_records_in_many_micro_batches() -> None:
    """Units that own records of many lengths, cut into micro-batches by rows, contribute the same bits."""
    adapted = attacked("deepseek_v3", "large", torch.float32)
    adapted.heights = (64, 128, 512)
    rng = np.random.default_rng(2)
    sizes = [rng.integers(1, 40, rng.integers(1, 5)).tolist() for _ in range(60)]
    assert is_bitwise(adapted, units_of_records([*sizes, [200, 100]]))


@pytest.mark.parametrize("side", [".lora_A", ".lora_B"])
@pytest.mark.parametrize("architecture", ["mixtral", "deepseek_v2"])
def test_an_expert_beyond_half_precision_spoils_only_the_units_that_it_sees(architecture: str, side: str) -> None:
    """Finite as it was sent, infinite in bfloat16. The filler of the last expert is infinity times zero, and nobody's:
    whether a round fails must not tell which expert the shortest record chose."""
    adapted = adapted_small(architecture, quantised=True)
    cast_base(adapted.module.backbone, torch.bfloat16)
    with torch.no_grad():
        for name, parameter in adapted.trainable.items():
            if side in name and "experts" in name and parameter.ndim == 3:
                parameter[-1] = 3.4e38
    spoilt = 0
    for seed in range(4):
        records = company(np.random.default_rng(seed), units=6, vocabulary=96, classes=5, low=1, high=2, longer=4)
        assert is_bitwise(adapted, records)
        sums = clipped_sum(adapted, records, 0.5)
        assert all(bool(torch.isfinite(value).all()) for value in sums.values())
        norms = [float(each[0]) for each in contributions(adapted, records)]
        spoilt += sum(not np.isfinite(norm) for norm in norms)
    assert 0 < spoilt < 4 * 7


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_experts_come_in_few_numbers(seed: int) -> None:
    """Whole tiles of each expert, whole vectors of all, and filler last; some kernels here would not mind."""
    rng = np.random.default_rng(seed)
    tokens, experts, top_k = int(rng.integers(1, 300)), int(rng.integers(2, 9)), int(rng.integers(1, 3))
    index = torch.from_numpy(rng.permuted(np.tile(np.arange(experts), (tokens + 3, 1)), axis=1)[:, :top_k].copy())
    made = Routing(index, experts, rows=tokens)
    assert not bool((torch.diff(made.ends, prepend=made.ends.new_zeros(1)) % 8).any())
    assert int(made.ends[-1]) % 32 == 0
    assert int(made.spans[-1, 1]) < int(made.ends[-1])
    assert torch.equal(made.spans[:, 1] - made.spans[:, 0], torch.bincount(index[:tokens].flatten(), minlength=experts))
    hidden = torch.randn(tokens + 3, 4)
    rows = made.select(hidden)
    filler = torch.ones(len(rows), dtype=torch.bool)
    for start, stop in made.spans.tolist():
        filler[start:stop] = False
    assert not bool(rows[filler].any())
    assert torch.equal(rows[~filler], hidden.index_select(0, made.tokens[~filler]))


def test_experts_without_lora_keep_to_it() -> None:
    """Experts that carry no adapter multiply by the same few shapes."""
    from fl_client.dp.adapt import adapt
    from fl_client.tasks.classification import CrossEntropy
    from fl_shared.documents.spec import LoraSection
    from helpers.random_models import float_model, quantise_in_place, small_config

    for quantised in (True, False):
        model = float_model(small_config("qwen3_moe"))
        if quantised:
            quantise_in_place(model)
        lora = LoraSection(rank=3, alpha=6.0, targets=("attention",))
        adapted = adapt(model, lora, CrossEntropy(5), torch.zeros(136), torch.ones(136))
        ATTACKS["large"](adapted, np.random.default_rng(3))
        assert len(adapted.plain_experts) == 2
        records = company(np.random.default_rng(6), units=20, vocabulary=96, classes=5, low=3, high=9, longer=31)
        assert is_bitwise(adapted, records)


@pytest.mark.parametrize("seed", range(20))
def test_a_cut_keeps_units_whole_and_within_bounds(seed: int) -> None:
    """Every unit once, whole; no micro-batch above its bounds unless one unit alone is."""
    rng = np.random.default_rng(seed)
    records = units_of_records([rng.integers(1, 300, rng.integers(1, 4)).tolist() for _ in range(80)])
    heights = heights_for(1000)
    found = cut(records, range(80), max_units=17, heights=heights)
    assert sorted(unit for chosen in found for unit in chosen) == list(range(80))
    for chosen in found:
        rows = sum(tokens_of(records, unit) for unit in chosen)
        assert len(chosen) <= 17
        assert rows <= FULL or len(chosen) == 1
        assert height(rows, heights) in HEIGHTS


def test_a_unit_larger_than_what_was_tried_is_refused() -> None:
    """Heights double until the site's largest unit finds room; they are tried, and none is used that was not."""
    assert heights_for(5000) == (*HEIGHTS, 4096, 8192)
    with pytest.raises(EngineError, match="a unit has 5000 tokens, and at most 2048 were tried"):
        height(5000)
    adapted = adapted_small("mixtral", quantised=True)
    check_layers(adapted, vocabulary=96)
    assert adapted.heights == HEIGHTS
    check_layers(adapted, vocabulary=96, rows=3000)
    assert adapted.heights == (*HEIGHTS, 4096)


def test_a_machine_whose_products_follow_the_number_of_rows_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kernel that adds in another order for some numbers of rows is found by the check, before any round."""
    right: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_rows

    def fickle(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        found = right(x, weight, ends)
        if x.shape[0] == 344:
            half = x.shape[1] // 2
            return right(x[:, :half], weight[:, :half], ends) + right(x[:, half:], weight[:, half:], ends)
        return found

    monkeypatch.setattr(invariance, "grouped_rows", fickle)
    with pytest.raises(EngineError, match="depends on its neighbours on this machine"):
        check_layers(adapted_small("mixtral", quantised=True), vocabulary=96)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_products_that_follow_a_rows_place_are_found_though_half_precision_hides_them(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """One product whose last row is a float32 rounding off: at one height, at the full one, in a block of rows."""
    adapted = adapted_small("mixtral", quantised=True)
    cast_base(adapted.module.backbone, dtype)
    right: Callable[..., Tensor] = torch.mm
    odd: set[int] = set()

    def fickle(x: Tensor, weight: Tensor, *, out: Tensor) -> Tensor:
        found = right(x, weight, out=out)
        if x.shape[0] in odd:
            found[-1] *= 1 + 2**-22
        return found

    monkeypatch.setattr(torch, "mm", fickle)
    odd |= {768, 1024}
    check_invariance(adapted, vocabulary=96, seed=1)
    assert adapted.heights == tuple(each for each in HEIGHTS if each not in odd)
    for rows in (FULL, 96):
        odd.clear()
        odd.add(rows)
        with pytest.raises(EngineError, match=f"depends on its place among {rows} rows"):
            check_invariance(adapted, vocabulary=96, seed=1)


def test_an_experts_product_that_follows_where_its_rows_begin_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of another expert before it change the alignment of an expert's own."""
    right: Callable[[Tensor, Tensor, Tensor], Tensor] = grouped_rows

    def fickle(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        found = right(x, weight, ends)
        begins = int(ends[0]) % len(x)
        return found if begins % 16 == 0 else found * (1 + 2**-22)

    monkeypatch.setattr(invariance, "grouped_rows", fickle)
    with pytest.raises(EngineError, match="depends on its neighbours on this machine"):
        check_invariance(adapted_small("mixtral", quantised=True), vocabulary=96, seed=1)


def test_what_is_tried_is_what_the_models_ask_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention is tried in the widths, scale and window of the model, and for lengths up to the run's."""
    tried = set()
    right = causal

    def noted(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
        tried.add((query.shape[1:], key.shape[1], value.shape[-1], window))
        return right(query, key, value, scaling, window)

    monkeypatch.setattr(invariance, "causal", noted)
    adapted = adapted_small("deepseek_v3", quantised=True)
    check_invariance(adapted, vocabulary=96, seed=1, rows=800)
    assert {(4, tokens, 16) for tokens in (1, 193, 512, 769)} <= {shape for shape, *_ in tried}
    assert {each[1:] for each in tried} == {(4, 12, None)}
    tried.clear()
    adapted = adapted_small("mixtral", quantised=True)
    adapted.module.backbone.config.sliding_window = 4  # type: ignore[union-attr]  # it is one
    check_invariance(adapted, vocabulary=96, seed=1)
    assert {each[1:] for each in tried} == {(2, 34, 4)}


def test_a_height_that_computes_otherwise_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the router's product differs at one height, that height is dropped; at the full one, all is refused."""
    adapted = adapted_small("mixtral", quantised=True)
    layer = adapted.module.backbone.get_submodule("layers.0.self_attn.o_proj")
    odd = {512}  # one of them

    def other(_: object, args: object, out: Tensor) -> Tensor:
        return out * (1 + 2**-20) if out.shape[1] in odd else out

    handle = layer.register_forward_hook(other)
    check_invariance(adapted, vocabulary=96, seed=1)
    assert adapted.heights == tuple(each for each in HEIGHTS if each != 512)

    def by_fill(_: object, args: object, out: Tensor) -> Tensor:
        packed = adapted.scope.packed
        return out * (1 + 2**-20) if packed is not None and packed.rows < 1000 else out

    handle.remove()
    layer.register_forward_hook(by_fill)
    with pytest.raises(EngineError, match="a unit's gradient depends on its neighbours"):
        check_invariance(adapted, vocabulary=96, seed=1)


def test_attention_that_mixes_records_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention whose rounding follows how many records lie side by side."""
    right = causal

    def mixing(query: Tensor, *rest: object) -> Tensor:
        found = right(query, *rest)  # type: ignore[arg-type]
        return found if query.shape[0] < 4 else found * (1 + 2**-22)

    monkeypatch.setattr(invariance, "causal", mixing)
    with pytest.raises(EngineError, match="attention over 1 tokens depends on the neighbours"):
        check_invariance(adapted_small("olmoe", quantised=True), vocabulary=96, seed=1)


def test_half_precision_on_cpu_is_multiplied_in_float32() -> None:
    """Rows of narrow bfloat16 products, whose order of additions follows their number in oneDNN, stay what they are."""
    from fl_client.dp.kernels import independent_rows

    torch.manual_seed(0)
    x, weight = torch.randn(512, 20).bfloat16(), torch.randn(20, 3).bfloat16()
    with independent_rows(torch.device("cpu"), torch.bfloat16):
        whole = x @ weight
        assert all(torch.equal(x[:rows] @ weight, whole[:rows]) for rows in range(8, 512, 8))
        out = torch.empty(512, 3, dtype=torch.bfloat16)
        torch.mm(x, weight, out=out)
        assert torch.equal(out, whole)
        assert torch.equal(out.clone().addmm_(x, weight), (out.float() + x.float() @ weight.float()).bfloat16())
    assert torch.equal(whole, (x.float() @ weight.float()).bfloat16())


def test_the_bound_on_rounding_grows_with_what_is_added() -> None:
    """Some thousandths at most for a hundred thousand units; more units or rows are dearer, none is free."""
    assert 2**-26 < slack(units=1, rows=1) < slack(units=1000, rows=4096) < 2**-13
    assert slack(units=100_000, rows=4096) < 2**-8
    assert slack(units=1000, rows=4096, ranks=8) > slack(units=1000, rows=4096)


def test_unpatched_experts_are_the_ones_that_are_tried() -> None:
    """The check multiplies with the very function that the layers use."""
    assert vars(invariance)["grouped_rows"] is vars(lora_layers)["grouped_rows"]
