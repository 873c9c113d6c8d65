"""Accountants against figures and programs that come from elsewhere."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant
from opacus.accountants import RDPAccountant as OpacusRDP
from opacus.accountants.analysis.rdp import compute_rdp

from fl_shared.errors import ConfigError
from fl_shared.privacy.accounting import (
    ORDERS,
    Filter,
    default_order,
    find_noise_multiplier,
    merged,
    pld_curve,
    pld_epsilon,
    rdp_curve,
    rdp_epsilon,
    renyi_cost,
    steps_that_fit,
)
from fl_shared.privacy.accounting.calibrate import noise_that_fits
from fl_shared.privacy.mechanism import Mechanism


def mechanism(sigma: float, q: float, steps: int, clip: float = 1.0) -> Mechanism:
    return Mechanism(noise_multiplier=sigma, sampling_probability=q, steps=steps, clipping_norm=clip)


TEXTBOOK = mechanism(1.0, 0.01, 1000)


def test_the_known_figures_of_a_known_mechanism() -> None:
    """For q .01, sigma 1, 1000 steps, delta 1e-5: PLD 1.828 and RDP 2.101, and never GDP's 1.618."""
    assert pld_epsilon([TEXTBOOK], 1e-5) == pytest.approx(1.828, abs=1e-3)
    assert rdp_epsilon([TEXTBOOK], 1e-5) == pytest.approx(2.101, abs=1e-3)


@pytest.mark.parametrize(
    ("sigma", "q", "steps", "delta"),
    [
        (1.0, 0.01, 1000, 1e-5),
        (0.8, 0.2, 30, 1e-5),
        (2.0, 0.1, 200, 1e-6),
        (4.0, 1.0, 20, 1e-4),
        (1.1, 0.3, 8, 1e-5),
    ],
)
def test_rdp_agrees_with_opacus(sigma: float, q: float, steps: int, delta: float) -> None:
    """Rényi curves are those of Opacus at whole orders, and never below them, nor 3 % above, at others.

    Checked by quadrature: Opacus' value is exact; dp-accounting's series adds terms of alternating sign by
    their size at fractional orders, which errs on the safe side.
    """
    found = rdp_curve([mechanism(sigma, q, steps)])
    exact = compute_rdp(q=q, noise_multiplier=sigma, steps=steps, orders=list(ORDERS))
    whole = np.array([order == int(order) for order in ORDERS])
    assert found[whole] == pytest.approx(exact[whole], rel=1e-6)
    assert np.all(found >= exact * (1 - 1e-6))
    assert np.all(found <= exact * 1.03)
    oracle = OpacusRDP()
    oracle.history = [(sigma, q, steps)]
    assert rdp_epsilon([mechanism(sigma, q, steps)], delta) == pytest.approx(
        oracle.get_epsilon(delta, alphas=list(ORDERS)), rel=5e-3
    )


@pytest.mark.parametrize(("sigma", "q", "steps", "delta"), [(1.0, 0.01, 1000, 1e-5), (0.8, 0.2, 30, 1e-5)])
def test_pld_agrees_with_another_numerical_accountant(sigma: float, q: float, steps: int, delta: float) -> None:
    """Epsilon by privacy loss distributions lies within 0.02 of Opacus' PRV accountant."""
    oracle = PRVAccountant()
    oracle.history = [(sigma, q, steps)]
    assert pld_epsilon([mechanism(sigma, q, steps)], delta) == pytest.approx(
        oracle.get_epsilon(delta, eps_error=0.01), abs=0.02
    )


@pytest.mark.parametrize("sigma", [0.7, 1.0, 5.0])
def test_one_gaussian_step_is_bounded_by_balle_and_wang(sigma: float) -> None:
    """PLD of one full-batch Gaussian is the exact epsilon of Balle and Wang 2018 (theorem 8), rounded up."""
    epsilon = pld_epsilon([mechanism(sigma, 1.0, 1)], 1e-5)

    def phi(x: float) -> float:
        return 0.5 * math.erfc(-x / math.sqrt(2))

    exact = phi(0.5 / sigma - epsilon * sigma) - math.exp(epsilon) * phi(-0.5 / sigma - epsilon * sigma)
    assert exact <= 1e-5 * (1 + 1e-6)
    assert exact == pytest.approx(1e-5, rel=5e-3)


@settings(max_examples=30, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.6, 8.0), st.floats(0.001, 1.0), st.integers(1, 50)), min_size=1, max_size=4),
    st.randoms(use_true_random=False),
)
def test_order_and_splitting_do_not_change_the_cost(parts: list[tuple[float, float, int]], random: object) -> None:
    """Composition is the same however rounds are ordered or split, and each addition costs more."""
    whole = [mechanism(*part) for part in parts]
    split = [mechanism(sigma, q, 1) for sigma, q, steps in parts for _ in range(steps)]
    random.shuffle(split)  # type: ignore[attr-defined]
    assert rdp_curve(split) == pytest.approx(rdp_curve(whole), rel=1e-9)
    assert rdp_epsilon(whole, 1e-5) == pytest.approx(rdp_epsilon(split, 1e-5), rel=1e-9)
    assert np.all(rdp_curve(whole) >= rdp_curve(whole[:1]))
    assert rdp_epsilon(whole, 1e-5) >= rdp_epsilon(whole[:-1], 1e-5)


def test_merging_ignores_what_does_not_cost() -> None:
    """The clipping norm cancels out of the cost; ten rounds of eight steps are one of eighty."""
    rounds = [mechanism(1.0, 0.1, 8, clip=float(index + 1)) for index in range(10)]
    assert list(merged(rounds).values()) == [80]
    assert rdp_epsilon(rounds, 1e-5) == rdp_epsilon([mechanism(1.0, 0.1, 80)], 1e-5)
    assert merged([mechanism(1.0, 0.1, 0)]) == {}


def test_nothing_costs_nothing() -> None:
    """No mechanism, or one of no steps, has epsilon 0."""
    for nothing in ([], [mechanism(1.0, 0.1, 0)]):
        assert rdp_epsilon(nothing, 1e-5) == 0.0
        assert pld_epsilon(nothing, 1e-5) == 0.0
        assert pld_curve(nothing, [1e-5, 1e-6]) == [0.0, 0.0]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-5, math.nan, math.inf])
def test_a_delta_that_is_none_is_refused(delta: float) -> None:
    """Both accountants refuse a delta outside (0, 1)."""
    for accountant in (rdp_epsilon, pld_epsilon):
        with pytest.raises(ConfigError, match="delta"):
            accountant([TEXTBOOK], delta)


def test_the_pld_curve_falls_with_delta() -> None:
    """A larger delta has a smaller epsilon, and the curve passes through the single figure."""
    curve = pld_curve([TEXTBOOK], [1e-7, 1e-5, 1e-3])
    assert curve == sorted(curve, reverse=True)
    assert curve[1] == pytest.approx(pld_epsilon([TEXTBOOK], 1e-5))


@settings(max_examples=25, deadline=None)
@given(
    st.floats(1.0, 10.0),
    st.sampled_from([1e-5, 1e-6]),
    st.lists(st.tuples(st.floats(0.7, 5.0), st.sampled_from([0.05, 0.2, 1.0]), st.integers(1, 20)), max_size=12),
)
def test_the_gate_never_admits_more_than_the_ceiling(
    epsilon: float, delta: float, wanted: list[tuple[float, float, int]]
) -> None:
    """Whatever is asked in whatever order, what was admitted has at most the ceiling's epsilon."""
    gate = Filter(epsilon, delta, default_order(epsilon, delta))
    granted: list[Mechanism] = []
    for part in wanted:
        if gate.admits(merged([*granted, mechanism(*part)])):
            granted.append(mechanism(*part))
    assert rdp_epsilon(granted, delta) <= epsilon
    assert renyi_cost(granted, gate.order) <= gate.bound


def test_the_shortcut_of_the_best_order_is_no_filter() -> None:
    """A gate that takes the best order of the moment lets a two-branch analyst pass the ceiling's delta.

    The analyst first looks at something that tells a little, then chooses between two mechanisms that fit at
    different orders. At a fixed order the admitted exponential moment stays at most 1; over the best orders
    the two branches' shares add up to more than 1, so the conversion to (epsilon, delta) no longer follows.
    """
    # First step: randomised response with privacy loss +-eta; branch probabilities under the first data set.
    eta = 0.05
    likely = math.exp(eta) / (1 + math.exp(eta))

    def renyi(order: float) -> float:
        other = 1 - likely
        moment = likely**order * other ** (1 - order) + other**order * likely ** (1 - order)
        return math.log(moment) / (order - 1)

    def share(chance: float, loss: float, order: float) -> float:
        return chance * math.exp((order - 1) * (loss - renyi(order)))

    for order in (3.0, 20.0):
        assert share(likely, eta, order) + share(1 - likely, -eta, order) == pytest.approx(1.0, abs=1e-9)
    assert share(likely, eta, 20.0) + share(1 - likely, -eta, 3.0) > 1.05


@pytest.mark.parametrize(("epsilon", "delta"), [(1.0, 1e-5), (8.0, 1e-5), (8.0, 1e-6)])
def test_the_default_order_wastes_little(epsilon: float, delta: float) -> None:
    """At the default order a common plan gets at least 85 % of the steps of its own best order."""
    gate = Filter(epsilon, delta, default_order(epsilon, delta))
    plan = mechanism(2.0, 0.1, 1)
    best = max(
        steps_that_fit(Filter(epsilon, delta, order), {}, plan)
        for order in ORDERS
        if 3 <= order < 40 and (epsilon > 1 or order > 14)
    )
    assert steps_that_fit(gate, {}, plan) >= 0.85 * best


def test_what_fits_fits_and_one_more_does_not() -> None:
    """steps_that_fit and noise_that_fits stop exactly at the gate."""
    gate = Filter(8.0, 1e-5, default_order(8.0, 1e-5))
    plan = mechanism(1.0, 0.1, 8)
    spent = merged([plan])
    room = steps_that_fit(gate, spent, plan)
    assert gate.admits(merged([plan, mechanism(1.0, 0.1, room)]))
    assert not gate.admits(merged([plan, mechanism(1.0, 0.1, room + 1)]))
    sigma = noise_that_fits(gate, spent, 0.1, 200)
    assert gate.cost(spent) + gate.cost(merged([mechanism(sigma, 0.1, 200)])) <= gate.bound
    assert gate.cost(spent) + gate.cost(merged([mechanism(sigma - 2e-3, 0.1, 200)])) > gate.bound


@pytest.mark.parametrize("accountant", ["rdp", "pld"])
def test_the_found_noise_meets_the_target_after_what_came_before(accountant: str) -> None:
    """find_noise_multiplier counts prior mechanisms, meets the target, and a little less noise would not."""
    prior = [mechanism(1.5, 0.1, 20)] if accountant == "rdp" else []
    sigma = find_noise_multiplier(4.0, 1e-5, 0.1, 50, prior=prior, accountant=accountant)  # type: ignore[arg-type]
    measure = rdp_epsilon if accountant == "rdp" else pld_epsilon
    assert measure([*prior, mechanism(sigma, 0.1, 50)], 1e-5) <= 4.0
    assert measure([*prior, mechanism(sigma - 2e-3, 0.1, 50)], 1e-5) > 4.0


def test_a_target_that_nothing_meets_is_refused() -> None:
    """When earlier mechanisms have used the target up, no noise helps, and the error says so."""
    with pytest.raises(ConfigError, match="no noise multiplier"):
        find_noise_multiplier(1.0, 1e-5, 0.1, 50, prior=[mechanism(0.7, 0.5, 100)])
    with pytest.raises(ConfigError, match="leaves nothing"):
        default_order(1e-4, 1e-5)
    with pytest.raises(ConfigError, match="order"):
        Filter(8.0, 1e-5, 1.0)
