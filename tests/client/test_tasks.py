"""The seam between engine and task: a task that nobody knew trains, is checked and is evaluated without an edit.

`Topics` exists here alone: a text may have several of the run's topics, its cell is "heart+lungs", the loss is a sum
of binary cross entropies, and it is measured by one number a unit.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
import socket
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fl_client.agent.alone import train_alone
from fl_client.agent.evaluation import evaluate_privately, figures_of, noisy_sums, sensitivity_of, unit_vectors
from fl_client.agent.site import OpenSite, open_site
from fl_client.data.units import UnitData
from fl_client.dp import engine
from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.audit.canaries import worst_case_adapter
from fl_client.dp.checks import check_layers
from fl_client.dp.layers.head import Head, PooledLinear
from fl_client.dp.layers.scope import BatchScope
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.records.packing import Packed
from fl_client.dp.records.records import Records, pack_units
from fl_client.dp.start import adapted_for, load_offset
from fl_client.inference.predict import evaluate, predict
from fl_client.model.load import TINY, LoadedModel, load_model
from fl_client.model.tokens import token_ids
from fl_client.site.config import SiteConfig
from fl_client.site.home import SiteHome
from fl_client.tasks import registry
from fl_client.tasks.cache import RecordCache
from fl_client.tasks.classification import Classification, CrossEntropy
from fl_client.tasks.registry import task_of
from fl_client.tasks.task import usable
from fl_client.training.ranks import worker
from fl_client.training.ranks.frames import receive
from fl_client.training.round import initial_adapter, train_round
from fl_shared.adapters.safetensors import pack
from fl_shared.declaration import Document
from fl_shared.documents.spec import LoraSection, RunSpec
from fl_shared.errors import ConfigError, EngineError
from fl_shared.identity.signing import SigningKey
from fl_shared.names import ALONE
from fl_shared.privacy.mechanism import Mechanism
from helpers.clipped import clipped_sum
from helpers.gradient_oracle import GradientOracle, relative_error
from helpers.random_models import float_model, quantise_in_place, small_config, units_of_records

TOPICS = ("lungs", "heart", "bones")


@dataclass(frozen=True)
class SumOfBinary:
    """One logit a topic; targets are 0 or 1, `[B, topics]`."""

    topics: int

    def head(self, mean: Tensor, std: Tensor, scope: BatchScope) -> Head:
        return PooledLinear(mean, std, self.topics, scope)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return binary(outputs, targets)

    def random_targets(self, count: int, chance: np.random.Generator) -> NDArray[np.float32]:
        return chance.integers(0, 2, (count, self.topics)).astype(np.float32)


def binary(outputs: Tensor, targets: Tensor) -> Tensor:
    """By its formula, `[B]`."""
    return (torch.log1p(torch.exp(outputs)) - targets * outputs).sum(1)


@dataclass(frozen=True)
class TopicsSection(Document):
    """What a spec's `[task]` of this kind would be."""

    kind: str
    topics: tuple[str, ...]
    max_tokens: int


@dataclass(frozen=True)
class Topics:
    """Several topics a text."""

    topics: tuple[str, ...]
    max_tokens: int

    measures: ClassVar[tuple[str, ...]] = ("matched",)
    requirement: ClassVar[str] = "has topics of the run"

    @classmethod
    def of(cls, section: TopicsSection) -> Topics:
        return cls(section.topics, section.max_tokens)

    @property
    def objective(self) -> SumOfBinary:
        return SumOfBinary(len(self.topics))

    def accepted(self, cells: Sequence[str]) -> tuple[str | None, ...]:
        return tuple(cell if set(cell.split("+")) <= set(self.topics) else None for cell in cells)

    def report(self, data: UnitData) -> str:
        return f"{len(usable(self, data).texts)} rows"

    def encode(self, data: UnitData, tokenizer: Any) -> Records:
        ids, truncated = token_ids(data.texts, tokenizer, self.max_tokens)
        return Records(ids, self._truth(data).astype(np.float32), tuple(data.records_by_unit()), truncated)

    def measure(self, outputs: NDArray[np.float32], data: UnitData) -> NDArray[np.float64]:
        matched = ((outputs > 0) == self._truth(data)).mean(1)
        counts = np.bincount(data.unit_of_record, minlength=data.units)
        return (np.bincount(data.unit_of_record, matched, data.units) / counts)[:, None]

    def figures(self, means: Sequence[float] | None, deviation: float | None) -> dict[str, Any]:
        return {"matched": means[0] if means else None, "matched_deviation": deviation}

    def summary(self, figures: dict[str, Any]) -> str:
        return f"matched {figures['matched']}"

    def score(self, outputs: NDArray[np.float32], data: UnitData) -> dict[str, float]:
        return {"matched": float(self.measure(outputs, data).mean())}

    def head_metadata(self) -> dict[str, Any]:
        return {"topics": list(self.topics)}

    def _truth(self, data: UnitData) -> NDArray[np.bool_]:
        return np.array([[topic in cell.split("+") for topic in self.topics] for cell in data.labels]).reshape(-1, 3)


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one line that a new kind costs."""
    monkeypatch.setitem(registry.KINDS, "topics", Topics.of)


@pytest.fixture(scope="module")
def model() -> LoadedModel:
    """The shipped base."""
    torch.set_num_threads(1)
    return load_model(TINY, device="cpu")


def classified(base_model: str, **training: Any) -> RunSpec:
    """A small spec."""
    return RunSpec.from_dict({
        "run": {"name": "demo", "base_model": base_model, "sites": ["clinic"], "rounds": 2, "quorum": 1},
        "task": {"kind": "classification", "labels": list(TOPICS), "max_tokens": 8},
        "lora": {"rank": 2, "targets": ["attention", "routed_experts"]},
        "training": {
            "noise_multiplier": 1.0, "clipping_norm": 1.0, "sampling_probability": 0.2, "steps_per_round": 1,
            "learning_rate": 0.1, "head_learning_rate": 0.5, "momentum": 0.0, **training,
        },
    })  # fmt: skip


def with_topics(spec: RunSpec) -> RunSpec:
    """The same run with a task that the documents do not know yet."""
    made = copy.copy(spec)
    object.__setattr__(made, "task", TopicsSection("topics", TOPICS, 8))
    return made


def data() -> UnitData:
    """Four units, one with two records, and one of topics that no run here has."""
    texts = ("cough", "fever and cough", "chest pain", "a broken rib", "asthma", "a bill")
    cells = ("lungs", "lungs+heart", "heart", "bones+lungs", "lungs", "money")
    return UnitData(texts, cells, np.array([0, 0, 1, 2, 3, 4]), 5, "f" * 64)


def small(architecture: str, objective: Any) -> AdaptedModel:
    """A small int8 model with the objective's head, under a random adapter."""
    base = quantise_in_place(float_model(small_config(architecture)))
    lora = LoraSection(rank=3, alpha=6.0, targets=("attention", "routed_experts"))
    made = adapt(base, lora, objective, torch.zeros(136), torch.ones(136))
    worst_case_adapter(made, np.random.default_rng(1))
    return made


@pytest.mark.parametrize("name", ["book", "hooks"])
def test_a_new_loss_is_clipped_exactly(name: engine.EngineName) -> None:
    """Targets of another shape and type: the clipped sum is that of stock Hugging Face, one record at a time."""
    adapted = small("mixtral", SumOfBinary(3))
    records = units_of_records([[5, 3], [9], [1], [2, 6, 4, 1], [7]])
    targets = np.random.default_rng(2).integers(0, 2, (len(records.ids), 3)).astype(np.float32)
    records = Records(records.ids, targets, records.of_unit, 0)
    oracle = GradientOracle(adapted, small_config("mixtral"), lambda out, truth: binary(out, truth).sum())
    norm = float(np.median(oracle.clipped_sum(records, 1.0)[1]))
    assert relative_error(clipped_sum(adapted, records, norm, engine=name), oracle.clipped_sum(records, norm)[0]) < 1e-5


@pytest.mark.parametrize("name", ["book", "hooks"])
def test_a_round_of_a_new_task_is_the_batch_size_one_loop(
    model: LoadedModel, monkeypatch: pytest.MonkeyPatch, name: engine.EngineName
) -> None:
    """`train_round` takes each unit's gradients clipped and summed, as a loop over single records gives them."""
    keys = itertools.count(1)
    monkeypatch.setattr(engine, "SecureStream", lambda: SecureStream(next(keys).to_bytes(32, "big")))
    spec = with_topics(classified(model.digest))
    task = task_of(spec)
    chosen = usable(task, data())
    assert (chosen.units, chosen.labels) == (4, data().labels[:5])
    offset = {key: np.full_like(value, 0.02) for key, value in initial_adapter(model, spec).items()}
    mechanism = Mechanism(noise_multiplier=1e-4, sampling_probability=1.0, steps=1, clipping_norm=1.0)
    update = train_round(model, chosen, spec, mechanism, offset, round=1, engine=name, expected_batch=4.0).update

    adapted = adapted_for(model, spec, task.objective)
    load_offset(adapted, spec, offset)
    records = task.encode(chosen, model.tokenizer)
    wanted = {key: np.zeros(tuple(p.shape)) for key, p in adapted.trainable.items()}
    for rows in records.of_unit:
        adapted.module.zero_grad(set_to_none=True)
        for row in rows:
            alone = pack_units(Records(records.ids, records.targets, (np.array([row]),), 0), [0], model.device)
            binary(adapted.module(alone.ids, alone.mask), torch.from_numpy(records.targets[[row]])).sum().backward()
        parts = {key: np.zeros(tuple(p.shape)) if p.grad is None else p.grad.double().numpy()
                 for key, p in adapted.trainable.items()}  # fmt: skip
        size = float(np.sqrt(sum(float((part**2).sum()) for part in parts.values())))
        for key, part in parts.items():
            wanted[key] += part * min(1.0, 1.0 / size)
    adapted.module.zero_grad(set_to_none=True)
    rate = {True: 0.5, False: 0.1}
    for key, value in update.items():
        moved = -rate[key.startswith("classifier.")] * wanted[key] / 4.0
        assert np.abs(value - moved).max() < 1e-4  # the noise: deviation 1e-4 times the rate over 4, and rounding


def test_a_loss_that_couples_records_is_refused() -> None:
    """Not one number a record, or a share of the batch's: typed, and before a private text is read."""

    class Mean(SumOfBinary):
        def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().losses(outputs, targets).mean()

    class OverTheBatch(SumOfBinary):
        def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
            return super().losses(outputs, targets) / len(targets)

    with pytest.raises(EngineError, match="Mean gives losses of shape"):
        check_layers(small("mixtral", Mean(3)), vocabulary=96)
    with pytest.raises(EngineError, match="are off by"):
        check_layers(small("mixtral", OverTheBatch(3)), vocabulary=96)


class LastToken(Head):
    """A head of a task's own: the last token's hidden state, without a parameter of its own."""

    @property
    def shape(self) -> tuple[int, ...]:
        return (2,)

    def packed(self, hidden: Tensor, batch: Packed) -> Tensor:
        ends = np.cumsum([tokens for tokens, count in batch.runs for _ in range(count)]) - 1
        return hidden[torch.from_numpy(ends)][:, :2]

    def padded(self, hidden: Tensor, mask: Tensor) -> Tensor:
        return hidden[torch.arange(len(mask)), mask.sum(1) - 1, :2]


@dataclass(frozen=True)
class FromLastToken(CrossEntropy):
    """Its objective."""

    def head(self, mean: Tensor, std: Tensor, scope: BatchScope) -> Head:  # type: ignore[override]  # another head
        return LastToken()


def test_a_head_need_not_be_pooled_nor_trained() -> None:
    """The engine's checks pass, and nothing but LoRA's factors is trained."""
    adapted = small("qwen3_moe", FromLastToken(2))
    assert check_layers(adapted, vocabulary=96) < 1e-5
    assert set(adapted.groups.values()) == {"attention", "routed_experts"}


def test_equal_objectives_share_an_adapted_model() -> None:
    """Other labels of the same number need no new layers and no new check; another objective does."""
    base = float_model(small_config("mixtral"))
    lora = LoraSection(rank=2, alpha=2.0, targets=("attention",))

    def adapted(objective: Any) -> AdaptedModel:
        return adapt(base, lora, objective, torch.zeros(136), torch.ones(136))

    first = adapted(Classification(("a", "b"), 8).objective)
    assert adapted(Classification(("c", "d"), 9).objective) is first
    assert adapted(SumOfBinary(2)) is not first


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OpenSite]:
    """A real site: table, keys, ledger, model; about a quarter of its units is held out."""
    home = SiteHome(tmp_path_factory.mktemp("site") / "home")
    home.make()
    SigningKey.generate().save(home.signing_key)
    home.fingerprint_key.write_text("ab" * 32)
    cells = itertools.cycle(("lungs", "lungs+heart", "heart", "bones+lungs", "money"))
    rows = "".join(f"cough number {number},{cell}\n" for number, cell in zip(range(240), cells, strict=False))
    (home.root / "records.csv").write_text(f"text,label\n{rows}")
    home.config.write_text(
        """
[site]
id = "clinic"
[server]
url = "https://127.0.0.1:1"
[data]
name = "topics"
path = "records.csv"
text_column = "text"
label_column = "label"
privacy_unit = "record"
holdout = 0.25
[model]
directory = "tiny"
device = "cpu"
engine = "hooks"
[policy]
min_noise_multiplier = 0.5
max_clipping_norm = 1.0
max_sampling_probability = 0.5
max_steps_per_round = 10
[budget]
epsilon = 50.0
delta = 1e-5
approver = "officer"
"""
    )
    config = SiteConfig.load(home, "clinic")
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, reply_every_s=0.0))
    site = open_site(home, config, lambda _: True, namespace=ALONE)
    yield site
    site.close()


def test_a_new_task_is_evaluated_with_noise_and_a_ledger_row(opened: OpenSite) -> None:
    """The task's own measure, noise of the sensitivity of its vectors, its own figures; charged like any other."""
    spec = with_topics(classified(opened.model.digest))
    offset = {"classifier.bias": np.array([9.0, -9.0, -9.0], np.float32)}  # says lungs, and lungs alone
    figures = evaluate_privately(opened, spec, pack(offset), 0.5)["body"]["figures"]
    assert opened.holdout is not None
    held = usable(task_of(spec), opened.holdout)
    assert 0 < held.units < opened.holdout.units
    right = {"lungs": 1.0, "lungs+heart": 2 / 3, "heart": 1 / 3, "bones+lungs": 2 / 3}
    assert figures["noise_deviation"] == 0.5 * np.sqrt(2.0)
    far = 6 * figures["noise_deviation"]  # one false alarm in five hundred million
    assert figures["noisy_sums"]["units"] == pytest.approx(held.units, abs=far)
    assert figures["noisy_sums"]["matched"] == pytest.approx(sum(right[cell] for cell in held.labels), abs=far)
    assert figures["matched"] == figures["noisy_sums"]["matched"] / figures["noisy_sums"]["units"]
    (spend,) = [spend for spend in opened.ledger.spends() if spend.reservation.purpose == "evaluation"]
    assert spend.outcome == "settled"
    assert spend.reservation.mechanism.clipping_norm == np.sqrt(2.0)


def test_a_measure_out_of_bounds_is_bounded_all_the_same() -> None:
    """What a unit adds to the released sum is at most the sensitivity, whatever a task measures."""

    class Boundless(Topics):
        def measure(self, outputs: NDArray[np.float32], data: UnitData) -> NDArray[np.float64]:
            return np.array([[np.nan], [np.inf], [-5.0], [1e300], [0.5]])[: data.units]

    task = Boundless(TOPICS, 8)
    vectors = unit_vectors(task, np.zeros((6, 3), np.float32), data())
    assert vectors.tolist() == [[1.0, 0.0], [1.0, 1.0], [1.0, 0.0], [1.0, 1.0], [1.0, 0.5]]
    assert np.linalg.norm(vectors, axis=1).max() <= sensitivity_of(task)
    sums = noisy_sums(vectors, 1e-3, SecureStream(bytes(32)))
    assert figures_of(task, sums, 1e-3)["matched"] == pytest.approx(0.5, abs=0.01)


def test_public_records_are_answered_and_scored_by_the_task(model: LoadedModel) -> None:
    """`predict` gives the head's outputs, whatever their number; `evaluate` the task's own figures."""
    spec = with_topics(classified(model.digest))
    offset = {"classifier.bias": np.array([9.0, -9.0, -9.0], np.float32)}
    assert predict(model, offset, ["a", "b"], spec).shape == (2, 3)
    assert predict(model, offset, [], spec).shape == (0, 3)
    scored = evaluate(model, offset, ["a", "b"], ["lungs", "heart"], spec)
    assert scored.figures == pytest.approx({"matched": 2 / 3})
    assert scored.n == 2


def test_a_kind_that_this_version_has_not_is_refused_by_name() -> None:
    """A coordinator may be ahead of a site."""
    spec = classified("sha256:" + "0" * 64)
    strange = copy.copy(spec)
    object.__setattr__(strange, "task", TopicsSection("telepathy", TOPICS, 8))
    with pytest.raises(ConfigError, match="'telepathy', and this version does classification, topics"):
        task_of(strange)


class Counting:
    """A tokenizer that counts how often it is called."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer, self.calls = tokenizer, 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        return self._tokenizer(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)


def test_records_are_kept_as_long_as_nothing_changes(model: LoadedModel) -> None:
    """The same values are not tokenised again; another text, label, unit, limit or tokenizer is. One entry is held."""
    tokenizer, kept = Counting(model.tokenizer), RecordCache()
    task, chosen = Topics(TOPICS, 8), data().part(range(5))
    first = kept.of(task, chosen, tokenizer)
    once = tokenizer.calls
    assert once > 0
    assert kept.of(Topics(TOPICS, 8), data().part(range(5)), tokenizer) is first  # equal values, other objects
    assert tokenizer.calls == once
    others: list[tuple[Any, UnitData]] = [
        (Topics(TOPICS, 2), chosen),
        (task, data().part([0, 1, 2, 3])),
        (task, UnitData((*chosen.texts[:4], "gout"), chosen.labels, chosen.unit_of_record, 4, "")),
        (task, UnitData(chosen.texts, ("bones", *chosen.labels[1:]), chosen.unit_of_record, 4, "")),
        (task, UnitData(chosen.texts, chosen.labels, np.arange(5), 5, "")),
    ]
    for number, (other, changed) in enumerate(others, start=2):
        fresh = other.encode(changed, model.tokenizer)
        found = kept.of(other, changed, tokenizer)
        assert tokenizer.calls == number * once
        assert found.ids == fresh.ids
        assert np.array_equal(found.targets, fresh.targets)
        assert [list(rows) for rows in found.of_unit] == [list(rows) for rows in fresh.of_unit]
    another = Counting(model.tokenizer)
    kept.of(*others[-1], another)
    assert another.calls == once
    assert kept.of(task, chosen, tokenizer) is not first  # it made room


def test_a_sites_second_round_does_not_tokenise_again(
    opened: OpenSite, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two rounds of the real agent on the same data: the tokenizer is called for the first alone, and the second
    trains on the same records."""
    kind, calls, trained = type(opened.model.tokenizer), list[int](), list[Any]()
    called, made = kind.__call__, engine.DPEngine.__init__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(len(trained))
        return called(self, *args, **kwargs)

    def noting(self: Any, adapted: AdaptedModel, records: Records, *args: Any, **kwargs: Any) -> None:
        if records.units > 20:  # not the check of the layers
            trained.append(records)
        made(self, adapted, records, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    monkeypatch.setattr("fl_client.training.round.DPEngine.__init__", noting)
    train_alone(opened, classified(opened.model.digest), SigningKey.generate(), tmp_path / "alone", lambda _: None)
    assert [spend.outcome for spend in opened.ledger.spends(run="alone:demo")] == ["settled"] * 2
    assert len(trained) == 2
    assert trained[0] is trained[1]
    assert calls
    assert set(calls) == {0}


def test_a_rank_keeps_its_records_too(model: LoadedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """The agent sends a rank the same records with each round: the rank tokenises those of the first."""
    kind, calls, kept = type(model.tokenizer), [], RecordCache()
    called = kind.__call__

    def counting(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return called(self, *args, **kwargs)

    monkeypatch.setattr(kind, "__call__", counting)
    spec = classified(model.digest)

    def round_of(texts: tuple[str, ...]) -> int:
        job = {
            "texts": list(texts), "labels": ["lungs", "heart"], "unit_of_record": [0, 1], "units": 2,
            "spec": spec.to_dict(), "mechanism": Mechanism(1.0, 1.0, 1, 1.0).to_dict(), "round": 1,
            "expected_batch": 2.0, "most_units": 2, "records_per_unit": 1, "private": False,
        }  # fmt: skip
        before = len(calls)
        here, agent = socket.socketpair()
        with here, agent:
            heard = threading.Thread(target=lambda: [receive(agent) for _ in range(2)])  # the step, and the update
            heard.start()
            worker.train(model, _OneRank(), job, b"", here, kept)  # type: ignore[arg-type]  # a group of one
            heard.join()
        return len(calls) - before

    assert round_of(("cough", "pain")) > 0
    assert round_of(("cough", "pain")) == 0
    assert round_of(("cough", "gout")) > 0


class _OneRank:
    """As the first rank of a group knows itself."""

    first = True
