"""Logical steps: any cut into micro-batches releases the same, noise once, every step counted, bad numbers refused."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from opacus.accountants import RDPAccountant

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.engine import DPEngine, EngineName
from fl_client.dp.mechanism import noise
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.optimizer import GridDPOptimizer
from fl_client.dp.records.packing import Packed, cut, pack
from fl_client.dp.records.records import Records
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import Mechanism
from helpers.clipped import clipped_sum
from helpers.random_models import adapted_small, units_of_records

# Seven units; with two or three in a micro-batch the last one is short.
SIZES = [[5, 3], [9], [1], [2, 6, 4, 1], [7], [3], [8, 8]]


@pytest.fixture
def adapted() -> AdaptedModel:
    """A small int8 model under a random adapter, fresh for every test."""
    return adapted_small("qwen2_moe", quantised=True)


def make(adapted: AdaptedModel, records: Records, **changes) -> DPEngine:  # type: ignore[no-untyped-def]
    """An engine with known keys."""
    mechanism = Mechanism(
        noise_multiplier=changes.pop("sigma", 1.0), sampling_probability=changes.pop("q", 0.5),
        steps=changes.pop("steps", 3), clipping_norm=changes.pop("norm", 0.5),
    )  # fmt: skip
    settings = {"learning_rate": 0.01, "head_learning_rate": 0.01, "momentum": 0.0, **changes}
    return DPEngine(
        adapted, records, mechanism, sampling=SecureStream(bytes(32)), noise=SecureStream(bytes([1] * 32)), **settings
    )


def released(engine: DPEngine, units: Sequence[int] | None = None) -> list[torch.Tensor]:
    """The noisy sum of every step; with `units` of one step on exactly these."""
    found: list[torch.Tensor] = []
    account = engine.optimizer.step_hook

    def listen(stepped: GridDPOptimizer) -> None:
        found.append(torch.cat([p.grad.reshape(-1) for p in stepped.params]) * stepped.expected_batch_size)
        account(stepped)

    engine.optimizer.attach_step_hook(listen)
    if units is None:
        engine.run()
    else:
        engine.step(units)
        engine.close()
    return found


@pytest.mark.parametrize("engine", ["book", "hooks"])
@pytest.mark.parametrize("max_units", [1, 2, 3])
def test_any_cut_releases_what_one_big_batch_does(adapted: AdaptedModel, max_units: int, engine: EngineName) -> None:
    """Sample, clipping and noise of the logical step do not depend on the micro-batches, nor on Opacus' hooks."""
    records = units_of_records(SIZES)
    (whole,) = released(make(adapted, records, learning_rate=0.0, head_learning_rate=0.0), range(7))
    again = make(adapted, records, learning_rate=0.0, head_learning_rate=0.0, max_units=max_units, engine=engine)
    torch.testing.assert_close(released(again, range(7))[0], whole, rtol=1e-5, atol=1e-5)


def test_a_cut_by_tokens_changes_nothing(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the bound on rows cuts."""
    records = units_of_records(SIZES)
    (whole,) = released(make(adapted, records, learning_rate=0.0, head_learning_rate=0.0), range(7))
    monkeypatch.setattr(adapted, "heights", (4, 8, 16))
    assert len(cut(records, range(7), heights=adapted.heights)) > 2
    again = make(adapted, records, learning_rate=0.0, head_learning_rate=0.0)
    torch.testing.assert_close(released(again, range(7))[0], whole, rtol=1e-5, atol=1e-5)


def test_steps_are_taken_on_the_noisy_sum_over_the_expected_batch(adapted: AdaptedModel) -> None:
    """A parameter moves by learning rate times release over q times the units, whatever the sample's size."""
    before = torch.cat([p.detach().reshape(-1).clone() for p in adapted.trainable.values()])
    engine = make(adapted, units_of_records(SIZES), q=0.5, learning_rate=0.1, head_learning_rate=0.1)
    (noisy,) = released(engine, [2])
    after = torch.cat([p.detach().reshape(-1) for p in adapted.trainable.values()])
    torch.testing.assert_close(before - after, 0.1 * noisy / 3.5, rtol=1e-4, atol=1e-6)


def test_an_empty_sample_is_noise_alone_and_counts(adapted: AdaptedModel) -> None:
    """No unit: the model does not run, the noise of the same key is released, the accountant hears of the step."""
    records = units_of_records(SIZES)
    ran: list[object] = []
    adapted.module.backbone.register_forward_pre_hook(lambda *_: ran.append(1))
    engine = make(adapted, records, steps=1)
    (noisy,) = released(engine, [])
    assert not ran
    expected = noise.noisy_sum(
        np.zeros(noisy.numel(), np.float32), engine.optimizer.grid, SecureStream(bytes([1] * 32))
    )
    torch.testing.assert_close(noisy, torch.from_numpy(expected), rtol=1e-6, atol=0)
    assert engine.executed().steps == 1


def test_noise_is_added_once_whatever_the_micro_batches(adapted: AdaptedModel) -> None:
    """Seven micro-batches of one unit draw as many noise words as one of seven."""
    records = units_of_records(SIZES)
    (noise,) = released(make(adapted, records, norm=1e-4, sigma=100.0), [])
    (noisy,) = released(make(adapted, records, norm=1e-4, sigma=100.0, max_units=1), range(7))
    torch.testing.assert_close(noisy, noise, rtol=0, atol=1e-3)  # the sum has at most norm 7e-4
    assert float(noise.std() / 1e-2) == pytest.approx(1.0, rel=0.05)


def test_the_accountant_hears_the_samplers_q_and_every_step(adapted: AdaptedModel) -> None:
    """q, sigma and steps of Opacus' accountant are the mechanism's, also when most samples are empty."""
    engine = make(adapted, units_of_records(SIZES), q=0.05, steps=12)
    assert len(released(engine)) == 12
    assert [tuple(entry) for entry in engine.accountant.history] == [(1.0, 0.05, 12)]
    assert engine.executed() == engine.mechanism
    assert engine.sampler.probability == engine.mechanism.sampling_probability
    other = RDPAccountant()
    other.history = [(1.0, 0.05, 12)]
    assert engine.accountant.get_epsilon(1e-5) == other.get_epsilon(1e-5)


@pytest.mark.parametrize("odd", ["a step too few", "another noise", "another q"])
def test_a_count_that_differs_from_the_order_stops_the_round(adapted: AdaptedModel, odd: str) -> None:
    """Whatever the accountant heard that was not ordered is refused before anything is handed out."""
    engine = make(adapted, units_of_records(SIZES), steps=2)
    if odd == "another noise":
        engine.optimizer.noise_multiplier = 0.5
    if odd == "another q":
        engine.optimizer.attach_step_hook(engine.accountant.get_optimizer_hook_fn(0.4))
    for _ in range(1 if odd == "a step too few" else 2):
        engine.step([0])
    engine.close()
    with pytest.raises(EngineError, match="the accountant counted"):
        engine.executed()


def test_opacus_skip_signals_make_one_logical_step(adapted: AdaptedModel) -> None:
    """`signal_skip_step` and `zero_grad` work as Opacus' own batch manager uses them: noise and count come once."""
    records = units_of_records(SIZES)
    (whole,) = released(make(adapted, records, learning_rate=0.0, head_learning_rate=0.0), range(7))
    engine = make(adapted, records, learning_rate=0.0, head_learning_rate=0.0)
    dp = engine.optimizer
    heard: list[torch.Tensor] = []
    dp.attach_step_hook(lambda o: heard.append(torch.cat([p.grad.reshape(-1) for p in o.params]) * 3.5))
    for units, last in (([0, 1, 2], False), ([3], False), ([4, 5, 6], True)):
        dp.signal_skip_step(do_skip=not last)
        engine.forward_backward(pack(records, units, torch.device("cpu")))
        dp.step()
        dp.zero_grad()
    engine.close()
    assert len(heard) == 1
    torch.testing.assert_close(heard[0], whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("engine", ["book", "hooks", "ghost"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_a_unit_that_is_not_finite_contributes_nothing(adapted: AdaptedModel, value: float, engine: EngineName) -> None:
    """An embedding that is no number spoils the units that hold its word, to the bit no other; the step goes on."""
    records = units_of_records([[5], [9], [1], [6], [7]])
    word = 95
    clean = dataclasses.replace(records, ids=tuple(tuple(min(i, word - 1) for i in row) for row in records.ids))
    spoilt = dataclasses.replace(clean, ids=(*clean.ids[:3], (1, word, 2), *clean.ids[4:]))
    with torch.no_grad():
        adapted.module.backbone.get_submodule("embed_tokens").get_parameter("weight")[word] = value
    others = dataclasses.replace(clean, of_unit=tuple(rows for unit, rows in enumerate(clean.of_unit) if unit != 3))
    wanted = clipped_sum(adapted, others, 1.0, engine=engine)
    found = clipped_sum(adapted, spoilt, 1.0, engine=engine)
    apart = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    assert apart <= 1e-12
    made = make(adapted, spoilt, steps=1, engine=engine)
    made.step([0, 3])
    made.close()
    assert made.report()["units_left_out"] == 1
    assert made.executed().steps == 1


def test_a_step_in_which_no_unit_is_finite_is_noise_alone(adapted: AdaptedModel) -> None:
    """A head that is no number leaves every unit out; what is released is noise, and the step counts."""
    with torch.no_grad():
        adapted.module.head.get_parameter("weight")[0, 0] = float("nan")
    engine = make(adapted, units_of_records(SIZES), steps=1)
    (noisy,) = released(engine, range(7))
    assert bool(torch.isfinite(noisy).all())
    assert engine.report()["units_left_out"] == 7
    assert engine.executed().steps == 1


def test_one_unit_that_does_not_fit_is_a_typed_error(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Halving ends at one unit: then the error names what to lower, and nothing was released or counted."""
    engine = make(adapted, units_of_records(SIZES))

    def full(*_: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(engine, "forward_backward", full)
    with caplog.at_level(logging.WARNING), pytest.raises(EngineError, match="does not fit into memory") as caught:
        engine.step(range(7))
    assert "max_tokens" in caught.value.fix
    assert engine.accountant.history == []
    engine.close()


def test_experts_that_the_data_reach_are_counted(adapted: AdaptedModel) -> None:
    """One token reaches at most top-k experts a layer; noise reaches all of them and is not counted."""
    engine = make(adapted, units_of_records([[1], [9], [9]]), steps=1)
    engine.step([])
    assert engine.report()["experts_reached"] == 0
    engine.step([0])
    few = engine.report()["experts_reached"]
    assert 2 <= few <= 4  # two layers, top-k 2
    engine.step([1, 2])
    assert few < engine.report()["experts_reached"] <= engine.report()["experts"] == 16
    engine.close()


@pytest.mark.parametrize(
    "text",
    ["CUDA error: out of memory", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)",
     "Triton Error [CUDA]: out of memory", "DefaultCPUAllocator: can't allocate memory: you tried ..."],
)  # fmt: skip
def test_memory_that_runs_out_in_any_library_halves_the_micro_batch(
    adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch, text: str
) -> None:
    """Most of them raise a bare RuntimeError. The release is the one of smaller micro-batches."""
    still = {"learning_rate": 0.0, "head_learning_rate": 0.0}
    (whole,) = released(make(adapted, units_of_records(SIZES), **still), range(7))
    engine = make(adapted, units_of_records(SIZES), **still)
    right = engine.forward_backward

    def tight(batch: Packed) -> None:
        if batch.units > 2:
            raise RuntimeError(text)
        right(batch)

    monkeypatch.setattr(engine, "forward_backward", tight)
    torch.testing.assert_close(released(engine, range(7))[0], whole, rtol=1e-5, atol=1e-5)
    assert engine.max_units == 2


def test_other_errors_do_not_pass_for_memory(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A RuntimeError that says something else goes on."""
    engine = make(adapted, units_of_records(SIZES))

    def broken(*_: object) -> None:
        raise RuntimeError("expected m1 and m2 to have the same dtype")

    monkeypatch.setattr(engine, "forward_backward", broken)
    with pytest.raises(RuntimeError, match="same dtype"):
        engine.step([0])


def test_products_are_never_rounded_to_tf32(adapted: AdaptedModel) -> None:
    """Whatever the environment or another library has set: what the noise pays assumes float32 products."""
    matmul = torch.backends.cuda.matmul
    matmul.allow_tf32 = matmul.allow_bf16_reduced_precision_reduction = True
    make(adapted, units_of_records(SIZES)).close()
    assert not matmul.allow_tf32
    assert not matmul.allow_bf16_reduced_precision_reduction


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"norm": 1e-5}, "clipping norm 1e-05"),
        ({"expected_batch": 0.0}, "expected batch 0"),
        ({"steps": 10**9}, "draws of noise"),
    ],
)
def test_figures_that_floats_cannot_serve_are_refused(
    adapted: AdaptedModel, changes: dict[str, float], message: str
) -> None:
    """Before the model runs."""
    with pytest.raises(EngineError, match=message):
        make(adapted, units_of_records(SIZES), **changes)


def test_training_happens_in_the_mode_that_was_checked(adapted: AdaptedModel) -> None:
    """A layer that mixes examples, or draws from torch's generator, in training mode only, has no say."""
    modes: set[bool] = set()
    inner = adapted.module.backbone.get_submodule("layers.0.self_attn")
    inner.register_forward_hook(lambda module, *_: modes.add(module.training))
    for engine in ("book", "hooks"):
        released(make(adapted, units_of_records(SIZES), engine=engine, steps=1, q=1.0))
    assert modes == {False}
    assert not any(module.training for module in adapted.module.modules())


def test_many_micro_batches_add_up_without_rounding(adapted: AdaptedModel) -> None:
    """Ten thousand equal contributions: in float32 the last ones would be rounded by more than the slack pays for."""
    engine = make(adapted, units_of_records(SIZES), norm=1.0)
    part = [(p, torch.full_like(p, 0.1)) for p in engine.optimizer.params]
    for _ in range(10_000):
        engine.optimizer.take_sums(part)
        engine.optimizer.clip_and_accumulate()
    before = engine.optimizer.gather_sum()
    engine.optimizer.take_sums(part)
    engine.optimizer.clip_and_accumulate()
    np.testing.assert_allclose(engine.optimizer.gather_sum() - before, np.float32(0.1), rtol=1e-9)
