"""Aggregators by name: against plain numpy and Flower's own, streaming, resumed, and with hostile updates."""

from __future__ import annotations

import itertools
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from flwr.serverapp.strategy import FedAdam, FedAvgM, FedMedian, FedTrimmedAvg, MultiKrum
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from fl_server.aggregation import RoundAggregate
from fl_server.aggregation.aggregate import rule_of
from fl_server.aggregation.mean import StreamingMean
from fl_server.aggregation.robust import median
from fl_server.aggregation.spool import Spool
from fl_server.aggregation.updates import Rule
from fl_shared.adapters.safetensors import SERVER_STATE, Tensors, digest, metadata, pack, unpack
from fl_shared.documents.aggregators import AGGREGATIONS, ROBUST
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import DataError
from helpers.flower_messages import reply
from helpers.specs import run_spec

SHAPES = {"layer.lora_A": (2, 3), "layer.lora_B": (3,)}
LARGER = {"a.lora_A": (3, 40), "b.lora_B": (7, 5, 3), "classifier.bias": (4,)}
_VALUE = st.floats(-1e3, 1e3, width=32)
_UPDATE = st.fixed_dictionaries(
    {name: hnp.arrays(np.float32, shape, elements=_VALUE) for name, shape in SHAPES.items()}
)


def _update(value: float) -> Tensors:
    return {name: np.full(shape, value, dtype=np.float32) for name, shape in SHAPES.items()}


def _random(seed: int, shapes: dict[str, tuple[int, ...]] = LARGER) -> Tensors:
    rng = np.random.default_rng(seed)
    return {name: rng.normal(0, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}


def _spec(name: str, sites: int = 5, **parameters: Any) -> RunSpec:
    names = [f"hospital-{number:03d}" for number in range(1, sites + 1)]
    return run_spec(sites=names, rounds=4, quorum=sites, aggregation=name, parameters=parameters, steps_per_round=2)


def _round(
    spec: RunSpec, updates: list[Tensors], folder: Path, base: bytes = b"", state: bytes = b""
) -> tuple[bytes, bytes]:
    made = RoundAggregate(spec, base, state, folder)
    for update in updates:
        made.add(update)
    assert made.most == len(updates)
    return made.finish()


def _run(
    spec: RunSpec, folder: Path, rounds: int, begin: tuple[bytes, bytes] = (b"", b""), first: int = 1
) -> tuple[bytes, bytes]:
    """Several rounds; the updates of a round follow from its number."""
    base, state = begin
    for number in range(first, rounds + 1):
        base, state = _round(spec, [_random(10 * number + site) for site in range(5)], folder, base, state)
    return base, state


def _same(left: Tensors, right: Tensors, tolerance: float = 0.0) -> None:
    assert sorted(left) == sorted(right)
    for name, value in left.items():
        assert value.dtype == right[name].dtype == np.float32
        np.testing.assert_allclose(value, right[name], rtol=tolerance, atol=tolerance)


@given(base=_UPDATE, updates=st.lists(_UPDATE, min_size=1, max_size=6))
@settings(deadline=None)
def test_streaming_equals_the_mean_in_double_precision(base: Tensors, updates: list[Tensors]) -> None:
    """base + mean, one update at a time, is the float64 mean rounded once, plus the base in float32."""
    adapter, state = _round(_spec("fedavg"), updates, Path(), pack(base))
    assert state == b""
    found = unpack(adapter)
    for name in SHAPES:
        mean = np.mean([u[name].astype(np.float64) for u in updates], axis=0).astype(np.float32)
        np.testing.assert_allclose(found[name], base[name] + mean, rtol=2e-7, atol=1e-4 * 2**-20)
        assert found[name].dtype == np.float32


def test_the_order_of_replies_does_not_change_a_bit(tmp_path: Path) -> None:
    """Whoever answers first, also after a crash, every aggregator gives the same bytes."""
    updates = [_random(seed) for seed in range(5)]
    for name in AGGREGATIONS:
        spec = _spec(name)
        found = {
            digest(_round(spec, list(order), tmp_path, pack(_random(9)))[0])
            for order in itertools.islice(itertools.permutations(updates), 0, 120, 17)
        }
        assert len(found) == 1, name


def test_an_added_update_is_copied_not_kept(tmp_path: Path) -> None:
    """What a caller does to its array afterwards changes nothing."""
    for name in AGGREGATIONS:
        made = RoundAggregate(_spec(name), b"", b"", tmp_path)
        plain = RoundAggregate(_spec(name), b"", b"", tmp_path)
        for _ in range(5):
            update = _update(1.0)
            made.add(update)
            for value in update.values():
                value[...] = 99.0
            plain.add(_update(1.0))
        assert made.finish() == plain.finish()


@pytest.mark.parametrize("poison", [np.nan, np.inf, -np.inf])
def test_a_value_that_is_not_finite_is_refused_and_changes_nothing(poison: float, tmp_path: Path) -> None:
    """One bad value among good ones refuses the whole update by the tensor's name; the mean is that of the others."""
    for rule in _rules(tmp_path):
        rule.add(_update(2.0))
        bad = _update(5.0)
        bad["layer.lora_B"][1] = poison
        with pytest.raises(DataError, match=r"layer\.lora_B"):
            rule.add(bad)
        assert rule.count == 1
        assert float(rule.result()["layer.lora_A"][0, 0]) == 2.0


def _rules(folder: Path) -> list[Rule]:
    return [rule_of(_spec(name), dict(SHAPES), folder) for name in ("fedavg", *ROBUST)]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda u: u.pop("layer.lora_B"), "missing"),
        (lambda u: u.update({"more": np.zeros(1, np.float32)}), "not expected"),
        (lambda u: u.update({"layer.lora_B": np.zeros(4, np.float32)}), "shape"),
        (lambda u: u.update({"layer.lora_A": np.zeros((3, 2), np.float32)}), "shape"),
        (lambda u: u.clear(), "no tensor"),
    ],
)
def test_other_names_or_shapes_are_refused(change: Any, word: str, tmp_path: Path) -> None:
    """An update of another form is refused in words that name the difference, by every rule."""
    for rule in _rules(tmp_path):
        update = _update(1.0)
        change(update)
        with pytest.raises(DataError, match=word):
            rule.add(update)
        assert rule.count == 0
        with pytest.raises(DataError, match="no update"):
            rule.result()


def test_a_value_that_could_overflow_a_sum_is_refused() -> None:
    """A finite value that no training reaches is refused by its tensor's name and changes nothing."""
    mean = StreamingMean(SHAPES)
    mean.add(_update(1.0))
    with pytest.raises(DataError, match="beyond 1e"):
        mean.add(_update(3e38))
    assert mean.count == 1
    for value in mean.result().values():
        np.testing.assert_array_equal(value, np.float32(1.0))


def test_the_form_of_most_sites_wins_the_first_round(tmp_path: Path) -> None:
    """Without a base one stranger cannot decide the form; with a tie nobody can, and a fifth form is refused."""
    made = RoundAggregate(_spec("fedavg"), b"", b"", tmp_path)
    odd = made.add({"odd": np.ones(2, np.float32)})
    usual = made.add(_update(1.0))
    with pytest.raises(DataError, match="no form has a majority"):
        made.winner()
    made.add(_update(3.0))
    assert made.winner() == usual != odd
    for number in range(2):
        made.add({f"odd-{number}": np.ones(2, np.float32)})
    with pytest.raises(DataError, match="yet another form"):
        made.add({"odd-3": np.ones(2, np.float32)})
    _same(unpack(made.finish()[0]), _update(2.0))


def test_the_mean_needs_two_adapters_of_memory_whatever_the_number_of_sites() -> None:
    """From 4 sites to 40, numpy's peak stays the same: the float64 sum, and the update that comes in."""
    size = 1 << 20
    peaks = []
    for sites in (4, 40):
        mean = StreamingMean({"w": (size,)})
        tracemalloc.start()
        for site in range(sites):
            mean.add({"w": np.full(size, site, np.float32)})
        result = mean.result()
        peaks.append(tracemalloc.get_traced_memory()[1] / (4 * size))
        tracemalloc.stop()
        assert float(result["w"][0]) == (sites - 1) / 2
    assert abs(peaks[1] - peaks[0]) < 0.05
    assert peaks[1] < 3.3


def test_a_robust_rule_needs_one_adapter_and_a_block_of_memory(tmp_path: Path) -> None:
    """From 5 sites to 40, memory does not grow with the sites; on disk nothing with a name is left."""
    size = 1 << 18
    peaks = []
    for sites in (5, 40):
        made = Spool(tmp_path, {"w": (size,)})
        made.block_bytes = 1 << 16
        rule = median(made)
        tracemalloc.start()
        for site in range(sites):
            rule.add({"w": np.full(size, site, np.float32)})
        result = rule.result()
        peaks.append(tracemalloc.get_traced_memory()[1] / (4 * size))
        tracemalloc.stop()
        assert float(result["w"][-1]) == (sites - 1) / 2
    assert peaks[1] < 1.6
    assert peaks[1] < peaks[0] + 0.2
    assert list(tmp_path.iterdir()) == []


def _arrays(tensors: Tensors) -> ArrayRecord:
    return ArrayRecord({name: Array(value) for name, value in sorted(tensors.items())})


def _flower(strategy: Any, base: Tensors, updates: list[Tensors], number: int = 1) -> Tensors:
    """What Flower's strategy makes of `base` and these updates; it averages whole adapters."""
    whole = [{name: base[name] + value for name, value in update.items()} for update in updates]
    arrays, _ = strategy.aggregate_train(number, [reply(update, node) for node, update in enumerate(whole, 1)])
    return {name: array.numpy().astype(np.float32) for name, array in arrays.items()}


@pytest.mark.parametrize(
    ("name", "parameters", "strategy"),
    [
        ("median", {}, FedMedian()),
        ("trimmed-mean", {"cut": 0.3}, FedTrimmedAvg(beta=0.3)),
        ("multi-krum", {"malicious": 1, "select": 2}, MultiKrum(num_malicious_nodes=1, num_nodes_to_select=2)),
    ],
)
def test_robust_rules_agree_with_flower(name: str, parameters: Any, strategy: Any, tmp_path: Path) -> None:
    """Seven updates, two of them far out: the same adapter as Flower's strategy in memory, whatever the block size."""
    base = _random(99)
    updates = [_random(seed) for seed in range(5)] + [
        {key: value * 50 for key, value in _random(seed).items()} for seed in (5, 6)
    ]
    wanted = _flower(strategy, base, updates)
    for block_bytes in (64, 1 << 20):
        made = RoundAggregate(_spec(name, sites=7, **parameters), pack(base), b"", tmp_path)
        (rule,) = made._rules.values()
        rule._spool.block_bytes = block_bytes  # type: ignore[attr-defined]
        for update in updates:
            made.add(update)
        _same(unpack(made.finish()[0]), wanted, 1e-6)
    worst = max(float(np.abs(wanted[key] - base[key]).max()) for key in base)
    assert worst < 1.0  # 50 times larger updates are in it nowhere


def test_server_momentum_agrees_with_flower(tmp_path: Path) -> None:
    """Four rounds of FedAvgM, packed and unpacked between rounds, against Flower's strategy that was never stopped."""
    spec = _spec("fedavgm", server_learning_rate=0.7, server_momentum=0.8)
    oracle = FedAvgM(server_learning_rate=0.7, server_momentum=0.8)
    wanted = {name: np.zeros(shape, np.float32) for name, shape in LARGER.items()}
    oracle.current_arrays = _arrays(wanted)
    adapter, state = b"", b""
    for number in range(1, 5):
        updates = [_random(10 * number + site) for site in range(5)]
        wanted = _flower(oracle, wanted, updates, number)
        adapter, state = _round(spec, updates, tmp_path, adapter, state)
        _same(unpack(adapter), wanted, 2e-6)


def test_server_adam_agrees_with_flower(tmp_path: Path) -> None:
    """Four rounds of FedAdam against Flower's, whose own bias correction, which the paper has not, is divided out."""
    spec = _spec("fedadam", server_learning_rate=0.05, beta_1=0.8, beta_2=0.95, tau=0.01)
    oracle = FedAdam(eta=0.05, beta_1=0.8, beta_2=0.95, tau=0.01)
    wanted = {name: np.zeros(shape, np.float32) for name, shape in LARGER.items()}
    adapter, state = b"", b""
    for number in range(1, 5):
        updates = [_random(10 * number + site) for site in range(5)]
        oracle.current_arrays = dict(wanted)
        oracle.eta = 0.05 * (1 - 0.8 ** (number + 1)) / np.sqrt(1 - 0.95 ** (number + 1))
        wanted = _flower(oracle, wanted, updates, number)
        adapter, state = _round(spec, updates, tmp_path, adapter, state)
        _same(unpack(adapter), wanted, 1e-5)


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_resumed_run_equals_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    """Stopped after round 2 and resumed from what was committed: the same bytes; without the state, others."""
    spec = _spec(name)
    through = _run(spec, tmp_path, 4)
    half = _run(spec, tmp_path, 2)
    assert metadata(half[0]) == {SERVER_STATE: digest(half[1])}
    assert _run(spec, tmp_path, 4, half, first=3) == through
    assert _run(spec, tmp_path, 4, (half[0], b""), first=3)[0] != through[0]


def test_the_state_of_another_adapter_is_refused(tmp_path: Path) -> None:
    """A state whose tensors are not the adapter's stops the round instead of bending it."""
    spec = _spec("fedavgm")
    adapter, _ = _run(spec, tmp_path, 1)
    with pytest.raises(DataError, match=r"state has no .* values"):
        _round(spec, [_random(1)], tmp_path, adapter, pack({"a.lora_A": np.zeros((1, 3), np.float32)}))


def test_a_result_that_no_adapter_can_hold_is_refused(tmp_path: Path) -> None:
    """A server learning rate that drives the adapter out of bounds fails the round with a fix."""
    with pytest.raises(DataError, match="beyond 1e") as caught:
        _round(_spec("fedavgm", server_learning_rate=1000.0), [_update(2e5)], tmp_path)
    assert "server" in caught.value.fix


def _hostile(values: NDArray[np.float32]) -> Tensors:
    return {"w": values}


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("median", {}), ("trimmed-mean", {"cut": 0.2}), ("multi-krum", {"malicious": 1, "select": 2})],
)
def test_one_hostile_site_in_five_moves_a_robust_rule_little(name: str, parameters: Any, tmp_path: Path) -> None:
    """An update a million times too large leaves the robust result within the honest ones; the mean is carried away."""
    rng = np.random.default_rng(3)
    honest = [rng.normal(1.0, 0.1, 500).astype(np.float32) for _ in range(4)]
    updates = [_hostile(value) for value in [*honest, np.full(500, 9e5, np.float32)]]
    found = unpack(_round(_spec(name, **parameters), updates, tmp_path)[0])["w"]
    assert (found >= np.min(honest, axis=0)).all()
    assert (found <= np.max(honest, axis=0)).all()
    carried = unpack(_round(_spec("fedavg"), updates, tmp_path)[0])["w"]
    assert (carried > 1e5).all()
