"""A round of training at a site: what comes out, what is refused, and what stays as it was."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch

from fl_client.data.units import UnitData
from fl_client.dp import engine
from fl_client.dp.engine import DPEngine
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.optimizer import GridDPOptimizer
from fl_client.inference.predict import evaluate, predict
from fl_client.model.load import TINY, LoadedModel, load_model
from fl_client.training.round import initial_adapter, train_round
from fl_shared.documents.spec import LORA_TARGETS, RunSpec
from fl_shared.errors import ConfigError, DataError, EngineError
from fl_shared.privacy.mechanism import Mechanism
from helpers.specs import run_spec

LABELS = ["lungs", "heart"]
MECHANISM = Mechanism(noise_multiplier=1.0, sampling_probability=0.5, steps=2, clipping_norm=1.0)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """The shipped base, loaded once, as in an agent."""
    torch.set_num_threads(1)
    return load_model(TINY, device="cpu")


@pytest.fixture(autouse=True)
def _known_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling and noise under known keys: who is drawn decides what some of these tests see."""
    keys = itertools.count(1)
    monkeypatch.setattr(engine, "SecureStream", lambda: SecureStream(next(keys).to_bytes(32, "big")))


def made_for(targets: Iterable[str] = LORA_TARGETS, **run: Any) -> RunSpec:
    """A small spec for the shipped base."""
    return run_spec(targets=targets, labels=LABELS, **run)


def data(*changed: str, label: str = "heart") -> UnitData:
    """Five units, one with two records; `changed` stands in for the first texts."""
    texts = ["cough", "fever and cough", "chest pain", "pain", "a broken rib", "asthma"]
    texts[: len(changed)] = changed
    labels = ("lungs", "lungs", "heart", label, "heart", "lungs")
    return UnitData(tuple(texts), labels, np.array([0, 0, 1, 2, 3, 4]), 5, "f" * 64)


def test_a_round_moves_the_plan_and_leaves_the_base(model: LoadedModel) -> None:
    """The update names exactly the planned tensors, all moved; the mechanism is the ordered one; the base is whole."""
    spec = made_for()
    start = initial_adapter(model, spec)
    base = {name: value.clone() for name, value in model.module.state_dict().items() if ".lora_" not in name}
    heard: list[tuple[int, int]] = []
    made = train_round(
        model, data(), spec, MECHANISM, {}, round=3, progress=lambda step, steps: heard.append((step, steps))
    )
    assert made.executed == MECHANISM
    assert heard == [(1, 2), (2, 2)]
    assert made.update.keys() == start.keys()
    assert {value.dtype for value in made.update.values()} == {np.dtype(np.float32)}
    assert all((value != 0).mean() > 0.99 for value in made.update.values())  # noise on every coordinate
    after = model.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in base.items())
    assert made.report["round"] == 3
    assert 0 < made.report["experts_reached"] <= made.report["experts"]
    assert made.report["engine"] == "book"


def test_two_rounds_never_share_their_noise(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same order twice gives independent updates: no seed of torch or numpy decides.

    The keys are the operating system's. The factors' coordinates have noise of one scale, so that their correlation
    has deviation 1/sqrt(n), and what the five units add to both is less than one more half. The bound is 6 deviations:
    less than one false alarm in ten million.
    """
    monkeypatch.setattr(engine, "SecureStream", SecureStream)
    spec, rounds = made_for(("attention",)), []
    for _ in range(2):
        torch.manual_seed(0)
        np.random.seed(0)  # the legacy generator has no say
        update = train_round(model, data(), spec, MECHANISM, {}, round=1).update
        rounds.append(np.concatenate([value.ravel() for name, value in update.items() if ".lora_" in name]))
    assert abs(np.corrcoef(rounds)[0, 1]) < 6 / np.sqrt(rounds[0].size)


def test_a_frozen_factor_stays_and_is_not_sent(model: LoadedModel) -> None:
    """With aggregation `ffa` factor A keeps its seeded values and is no part of the update."""
    spec = made_for(aggregation="ffa")
    made = train_round(model, data(), spec, MECHANISM, {}, round=1)
    assert made.update
    assert not any(".lora_A" in name for name in made.update)


def test_the_offset_is_where_training_starts(model: LoadedModel) -> None:
    """The update is the difference from start + offset, and a wrong name or shape is refused."""
    spec = made_for(("attention",))
    none = dataclasses.replace(MECHANISM, noise_multiplier=1e-4, sampling_probability=1.0)
    offset = {name: np.full_like(value, 0.01) for name, value in initial_adapter(model, spec).items()}
    here = train_round(model, data(), spec, none, offset, round=2).update
    there = train_round(model, data(), spec, none, {}, round=1).update
    assert max(float(np.abs(here[name] - there[name]).max()) for name in here) > 1e-4
    name = next(iter(offset))
    with pytest.raises(ConfigError, match="does not belong to this model"):
        train_round(model, data(), spec, none, {name: np.zeros((1, 1), np.float32)}, round=1)
    with pytest.raises(ConfigError, match="'strange'"):
        train_round(model, data(), spec, none, {"strange": np.zeros(3, np.float32)}, round=1)


def test_long_and_empty_texts_train(model: LoadedModel) -> None:
    """A text beyond the limit is cut and counted for the site; an empty one becomes one pad token."""
    made = train_round(model, data("cough " * 100, ""), made_for(("attention",)), MECHANISM, {}, round=1)
    assert made.report["truncated_texts"] == 1


def test_a_label_outside_the_set_is_named_by_record(model: LoadedModel) -> None:
    """The message has the record's number and not the label."""
    with pytest.raises(DataError, match="record 4 has a label outside") as caught:
        train_round(model, data(label="SECRETDISEASE"), made_for(("attention",)), MECHANISM, {}, round=1)
    assert "SECRET" not in str(caught.value)


def test_units_without_records_do_not_exist() -> None:
    """A unit that owns nothing is refused where the data is made."""
    with pytest.raises(DataError, match="unit 1 has no records"):
        UnitData(("a", "b"), ("x", "y"), np.array([0, 2]), 3, "f" * 64)


def test_a_poisoned_adapter_is_answered_with_noise(model: LoadedModel) -> None:
    """An offset that makes every loss infinite leaves all units out: the round goes on, and tells nothing."""
    spec = made_for(("attention",))
    offset = {"classifier.weight": np.full((2, model.feature_mean.shape[0]), 3e38, np.float32)}
    whole = dataclasses.replace(MECHANISM, sampling_probability=1.0)
    made = train_round(model, data(), spec, whole, offset, round=1)
    assert made.executed == whole
    assert made.report["units_left_out"] == whole.steps * data().units
    assert all(np.isfinite(value).all() for value in made.update.values())


def test_a_step_that_is_not_counted_returns_nothing(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """What differs from the order raises; there is no update then."""
    monkeypatch.setattr(DPEngine, "step", lambda self, units: self.optimizer.original_optimizer.step())
    with pytest.raises(EngineError, match="the accountant counted"):
        train_round(model, data(), made_for(("attention",)), MECHANISM, {}, round=1)


def test_public_data_trains_without_noise_only_when_told(model: LoadedModel) -> None:
    """Two full-batch runs without privacy agree to the last bit; two private ones never do."""
    spec = made_for(("attention",))
    whole = dataclasses.replace(MECHANISM, sampling_probability=1.0)
    first, second = (train_round(model, data(), spec, whole, {}, round=1, private=False).update for _ in range(2))
    assert all(np.array_equal(first[name], second[name]) for name in first)


def test_evaluation_is_of_start_plus_offset(model: LoadedModel) -> None:
    """A head that always says `heart` is right as often as hearts come; no texts is a typed error."""
    spec = made_for(("attention",))
    offset = {"classifier.bias": np.array([0.0, 5.0], np.float32)}
    found = evaluate(model, offset, ["a", "b", "c"], ["heart", "heart", "lungs"], spec)
    assert (found.figures["accuracy"], found.figures["majority"]) == pytest.approx((2 / 3, 2 / 3))
    assert found.n == 3
    assert predict(model, offset, ["a"], spec).shape == (1, 2)
    with pytest.raises(DataError):
        evaluate(model, offset, [], [], spec)


def test_no_unit_left_makes_noise_of_the_same_scale(model: LoadedModel) -> None:
    """With an expected batch from outside, an update tells nobody whether any unit has a label of the run."""
    spec = made_for(("attention",))
    mechanism = dataclasses.replace(MECHANISM, noise_multiplier=20.0)  # far above what five units add
    nobody = UnitData((), (), np.empty(0, np.int64), 0, "f" * 64)
    scales = []
    for chosen in (nobody, data()):
        made = train_round(model, chosen, spec, mechanism, {}, round=1, expected_batch=2.5)
        assert made.executed == mechanism
        factors = np.concatenate([value.ravel() for name, value in made.update.items() if ".lora_" in name])
        assert factors.size > 5_000
        scales.append(float(factors.std()))
    assert scales[0] == pytest.approx(scales[1], rel=0.1)  # seven deviations of their ratio
    with pytest.raises(EngineError, match="expected batch 0"):
        train_round(model, nobody, spec, mechanism, {}, round=1)


def test_an_offset_for_a_frozen_factor_is_refused(model: LoadedModel) -> None:
    """Frozen factors stay at the seeded start that every site knows, whatever a coordinator sends."""
    spec = made_for(aggregation="ffa")
    start = initial_adapter(model, spec)
    name = next(name for name in start if ".lora_A" in name)
    with pytest.raises(ConfigError, match="does not belong"):
        train_round(model, data(), spec, MECHANISM, {name: np.full_like(start[name], 1e3)}, round=2)


def test_the_coordinators_adapter_has_no_say_in_the_check(model: LoadedModel) -> None:
    """A head so sure of one label that probe gradients vanish: the layers are checked on the public start instead."""
    spec = made_for(("shared_experts",))  # no earlier test has checked these layers
    offset = {"classifier.bias": np.array([0.0, 200.0], np.float32)}
    assert train_round(model, data(), spec, MECHANISM, offset, round=2).executed == MECHANISM


def test_memory_that_runs_out_outside_the_micro_batches_is_typed(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the step itself nothing can be halved: an EngineError, and no update."""

    def full(*_: object) -> None:
        raise RuntimeError("CUDA error: out of memory")

    monkeypatch.setattr(GridDPOptimizer, "add_noise", full)
    with pytest.raises(EngineError, match="memory ran out"):
        train_round(model, data(), made_for(("attention",)), MECHANISM, {}, round=1)
