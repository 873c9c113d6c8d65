"""What each aggregator asks of a site: which tensors train, exact clipping of them, and what a mean of them means."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from peft import PeftConfig
from safetensors.numpy import load_file

from fl_client.data.units import UnitData
from fl_client.dp.adapt import PREFIX, AdaptedModel
from fl_client.dp.checks import check_layers
from fl_client.dp.engine import EngineName
from fl_client.dp.initial import initial_tensors
from fl_client.dp.layers.book import GradientBook
from fl_client.dp.records.records import pack_units
from fl_client.export.peft import export_peft, write_peft
from fl_client.model.load import TINY, LoadedModel, load_model
from fl_client.training.round import initial_adapter, train_round
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import EngineError
from helpers.clipped import clipped_sum, group_errors
from helpers.gradient_oracle import GradientOracle, Gradients, relative_error
from helpers.random_models import ARCHITECTURES, adapted_small, small_config, units_of_records
from helpers.specs import run_spec

torch.set_num_threads(1)
TOLERANCE = 1e-5
SIZES = [[5, 3], [9], [1], [2, 6, 4, 1], [7]]


def without(adapted: AdaptedModel, *factors: str) -> frozenset[str]:
    """The planned tensors with one of these factors in their name, now frozen."""
    frozen = frozenset(name for name in adapted.trainable if any(factor in name for factor in factors))
    for name, parameter in adapted.trainable.items():
        parameter.requires_grad_(name not in frozen)
    return frozen


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_cores_are_clipped_exactly(architecture: str, quantised: bool) -> None:
    """fed-sb: cores and head, units of several records, some clipped, to 1e-5; frozen factors count in no norm."""
    adapted = adapted_small(architecture, quantised=quantised, core=True)
    frozen = without(adapted, ".lora_A", ".lora_B")
    oracle = GradientOracle(adapted, small_config(architecture))
    records = units_of_records(SIZES)
    norm = float(np.median(oracle.clipped_sum(records, 1.0)[1]))
    wanted, _ = oracle.clipped_sum(records, norm)
    errors = group_errors(adapted, clipped_sum(adapted, records, norm, frozen=frozen), wanted)
    assert {"attention", "routed_experts", "head"} <= set(errors)
    assert max(errors.values()) < TOLERANCE, errors
    assert all(".lora_R" in name or adapted.groups[name] == "head" for name in wanted)


@pytest.mark.parametrize("engine", ["hooks", "ghost"])
@pytest.mark.parametrize("architecture", ["deepseek_v3", "qwen2_moe"])
def test_opacus_clips_cores_the_same(architecture: str, engine: EngineName) -> None:
    """Opacus' hooks and its ghost clipping give the book's clipped sum of cores."""
    adapted = adapted_small(architecture, quantised=True, core=True)
    frozen = without(adapted, ".lora_A", ".lora_B")
    records = units_of_records(SIZES if engine == "hooks" else [[5], [9], [1], [6], [7]])
    found = clipped_sum(adapted, records, 0.5, frozen=frozen)
    errors = group_errors(adapted, clipped_sum(adapted, records, 0.5, frozen=frozen, engine=engine), found)
    assert max(errors.values()) < TOLERANCE, errors


@pytest.mark.parametrize("architecture", ["deepseek_v3", "mixtral"])
def test_factors_b_alone_are_clipped_exactly(architecture: str) -> None:
    """ffa: with every factor A frozen, the sum of clipped B and head gradients is the oracle's."""
    adapted = adapted_small(architecture, quantised=True)
    frozen = without(adapted, ".lora_A")
    oracle = GradientOracle(adapted, small_config(architecture))
    records = units_of_records(SIZES)
    norm = float(np.median(oracle.clipped_sum(records, 1.0)[1]))
    wanted, _ = oracle.clipped_sum(records, norm)
    errors = group_errors(adapted, clipped_sum(adapted, records, norm, frozen=frozen), wanted)
    assert max(errors.values()) < TOLERANCE, errors


def test_the_start_up_check_sees_a_core_that_is_booked_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    """The probe passes on cores as they are, and stops when a core's gradient is left out of the book's norm."""
    assert check_layers(adapted_small("deepseek_v3", quantised=True, core=True), vocabulary=96) < 1e-4
    first = GradientBook.add_factor

    def outside_the_norm(book: GradientBook, *args: object) -> None:
        before = book._squared.clone()
        first(book, *args)  # type: ignore[arg-type]
        book._squared = before

    monkeypatch.setattr(GradientBook, "add_factor", outside_the_norm)
    with pytest.raises(EngineError, match="per-unit gradients"):
        check_layers(adapted_small("deepseek_v3", quantised=True, core=True), vocabulary=96)


def _logits(adapted: AdaptedModel, values: Gradients) -> torch.Tensor:
    records = units_of_records(SIZES)
    with torch.no_grad():
        for name, parameter in adapted.trainable.items():
            parameter.copy_(values[name])
        batch = pack_units(records, range(records.units), torch.device("cpu"))
        found: torch.Tensor = adapted.module(batch.ids, batch.mask)
    return found


def _products(adapted: AdaptedModel, values: Gradients) -> dict[str, torch.Tensor]:
    """What each adapted matrix gains: `B A`, with a core `B R A`."""
    found = {}
    for name in adapted.trainable:
        if ".lora_A" in name:
            b = values[name.replace(".lora_A", ".lora_B")]
            core = values.get(name.replace(".lora_A", ".lora_R"))
            found[name] = (b if core is None else b @ core) @ values[name]
    return found


@pytest.mark.parametrize(("kind", "exact"), [("fedavg", False), ("ffa", True), ("fed-sb", True)])
def test_which_means_are_means_of_models(kind: str, exact: bool) -> None:
    """Averaging tensors averages the sites' models under ffa and fed-sb, and does not under fedavg."""
    adapted = adapted_small("deepseek_v3", quantised=True, core=kind == "fed-sb")
    fixed = {"fedavg": (), "ffa": (".lora_A",), "fed-sb": (".lora_A", ".lora_B")}[kind]
    rng = np.random.default_rng(4)
    start = {name: value.detach().clone() for name, value in adapted.trainable.items()}
    sites = []
    for _ in range(3):
        moved = {n: torch.from_numpy(rng.normal(0, 0.1, tuple(v.shape)).astype(np.float32)) for n, v in start.items()}
        sites.append({n: v if any(f in n for f in fixed) else v + moved[n] for n, v in start.items()})
    mean = {name: torch.stack([site[name] for site in sites]).mean(0) for name in start}
    products = [_products(adapted, site) for site in sites]
    found = _products(adapted, mean)
    wanted = {name: torch.stack([each[name] for each in products]).mean(0) for name in found}
    error = relative_error(found, wanted)
    assert (error < 1e-6) == exact, error
    assert exact or error > 1e-2


def test_a_run_with_cores_starts_from_the_base_and_can_move() -> None:
    """Seeded factors are not zero, have about unit columns and rows, and zero cores leave the base as it is."""
    adapted = adapted_small("deepseek_v3", quantised=True, core=True, rank=16)
    start = {name: torch.from_numpy(value) for name, value in initial_tensors(adapted, 3).items()}
    for name, value in start.items():
        if ".lora_R" in name or adapted.groups[name] == "head":
            assert not value.any()
        else:
            lengths = value.norm(dim=-1 if ".lora_A" in name else -2)
            assert 0.7 < float(lengths.mean()) < 1.3, name
    again = initial_tensors(adapted, 3)
    assert all(np.array_equal(again[name], value.numpy()) for name, value in start.items())
    others = {name: value.clone() for name, value in start.items()}
    for name in others:
        if ".lora_A" in name:
            others[name] = torch.zeros_like(others[name])
    for values in (start, others):
        values["classifier.weight"] = torch.ones_like(values["classifier.weight"])
        values["classifier.weight"][0] = -1
    assert torch.equal(_logits(adapted, start), _logits(adapted, others))
    moved = start | {name: torch.eye(16).expand_as(value) for name, value in start.items() if ".lora_R" in name}
    assert not torch.allclose(_logits(adapted, start), _logits(adapted, moved))


def test_an_exported_core_is_plain_lora(tmp_path: Path) -> None:
    """The exported directory holds factors of plain LoRA; in our own LoRA layers they give the core model's logits."""
    adapted = adapted_small("deepseek_v3", quantised=False, core=True)
    values = {name: value.detach().clone() for name, value in adapted.trainable.items()}
    wanted = _logits(adapted, values)
    write_peft(
        adapted,
        {n: v.numpy() for n, v in values.items()},
        tmp_path,
        head_metadata={"labels": list("abcde")},
        digest="sha256:0",
    )
    stock = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("lora_R" in name for name in stock)
    assert PeftConfig.from_pretrained(str(tmp_path)).r == 3
    plain = adapted_small("deepseek_v3", quantised=False)  # the same base
    merged = {name: value for name, value in values.items() if ".lora_R" not in name}
    for name, core in values.items():
        if ".lora_R" in name:
            up = name.replace(".lora_R", ".lora_B")
            merged[up] = values[up] @ core
            if up in stock:  # attention and shared experts keep their names
                np.testing.assert_allclose(stock[up], merged[up].numpy(), rtol=1e-5, atol=1e-6)
    assert any(name in stock for name in merged if ".lora_B" in name and name.startswith(PREFIX))
    torch.testing.assert_close(_logits(plain, merged), wanted, rtol=1e-4, atol=1e-5)


@pytest.fixture(scope="module")
def tiny() -> LoadedModel:
    """The shipped base."""
    return load_model(TINY, device="cpu")


def _spec(model: LoadedModel, name: str) -> RunSpec:
    return run_spec(
        base_model=model.digest,
        labels=["lungs", "heart"],
        aggregation=name,
        rank=4,
        noise_multiplier=0.001,
        sampling_probability=1.0,
        steps_per_round=1,
        learning_rate=0.5,
    )


@pytest.mark.parametrize(("name", "fixed"), [("ffa", (".lora_A",)), ("fed-sb", (".lora_A", ".lora_B"))])
def test_a_round_sends_what_trains_and_leaves_the_rest_at_its_seed(
    tiny: LoadedModel, name: str, fixed: tuple[str, ...], tmp_path: Path
) -> None:
    """Two rounds on the shipped base: no frozen factor travels, the second round takes the first one's update in, and
    the exported adapter's frozen factor A is the seed's."""
    texts = ("cough", "fever and cough", "chest pain", "a broken heart")
    data = UnitData(texts, ("lungs", "lungs", "heart", "heart"), np.arange(4), 4, "f" * 64)
    spec = _spec(tiny, name)
    first = train_round(tiny, data, spec, spec.mechanism(), {}, round=1)
    start = initial_adapter(tiny, spec)
    assert {key for key in start if not any(each in key for each in fixed)} == set(first.update)
    assert all(value.any() for value in first.update.values())
    second = train_round(tiny, data, spec, spec.mechanism(), first.update, round=2)
    assert set(second.update) == set(first.update)
    export_peft(tiny, spec, first.update, tmp_path)
    stock = load_file(tmp_path / "adapter_model.safetensors")
    factors = [key for key in start if ".lora_A" in key]
    assert factors
    assert all(np.array_equal(stock[key], start[key]) for key in factors)
    assert all(stock[key.replace(".lora_A", ".lora_B")].any() for key in factors)
