"""The audit's arithmetic: it must never accuse the honest too often, and must accuse the guilty."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import binom, binomtest

from fl_client.dp.audit.one_run import audit, chance, epsilon_lower_bound
from fl_shared.errors import EngineError


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 400), st.floats(0, 1))
def test_pure_epsilon_is_a_clopper_pearson_bound(guesses: int, share: float) -> None:
    """With delta 0 the bound is the logit of scipy's exact one-sided binomial confidence bound."""
    correct = round(share * guesses)
    low = binomtest(correct, guesses, alternative="greater").proportion_ci(0.95, method="exact").low
    expected = max(0.0, math.log(low / (1 - low))) if low > 0 else 0.0
    assert epsilon_lower_bound(guesses, guesses, correct, 0.0) == pytest.approx(expected, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 200), st.floats(0.5, 1), st.floats(1e-9, 1e-3), st.floats(1.1, 10))
def test_delta_only_weakens_the_proof(guesses: int, share: float, delta: float, factor: float) -> None:
    """A larger delta, or more canaries for the same guesses, never raises the bound."""
    correct = round(share * guesses)
    bound = epsilon_lower_bound(guesses, guesses, correct, delta)
    assert bound <= epsilon_lower_bound(guesses, guesses, correct, 0.0) + 1e-9
    assert epsilon_lower_bound(guesses, guesses, correct, min(0.9, factor * delta)) <= bound + 1e-9
    assert epsilon_lower_bound(3 * guesses, guesses, correct, delta) <= bound + 1e-9


@pytest.mark.parametrize(("epsilon", "delta"), [(0.5, 0.0), (1.0, 1e-5), (2.0, 1e-2)])
def test_an_exactly_private_run_is_rarely_accused(epsilon: float, delta: float) -> None:
    """Randomised response that leaks a coin with chance delta is accused in at most 5 % of runs (binomial bound)."""
    rng = np.random.default_rng(1)
    runs, canaries, accused = 400, 100, 0
    keep = math.exp(epsilon) / (1 + math.exp(epsilon))
    for _ in range(runs):
        coins = rng.random(canaries) < 0.5
        leaked = rng.random(canaries) < delta
        right = (rng.random(canaries) < keep) | leaked
        scores = np.where(coins == right, 1.0, 0.0) + 2 * np.where(leaked, np.where(coins, 1, -1), 0)
        scores = scores + 1e-3 * rng.random(canaries)
        accused += audit(scores, coins, guesses=100, delta=delta).epsilon_lower > epsilon
    assert accused <= binom.isf(1e-6, runs, 0.05)


def test_a_run_without_privacy_is_accused() -> None:
    """If every guess is right the bound is the best possible one, and it grows with the number of guesses."""
    coins = np.arange(200) % 2 == 0
    result = audit(coins.astype(float), coins, guesses=200, delta=1e-5)
    assert result.correct == 200
    assert result.epsilon_lower == result.best_possible > 3.5
    assert result.epsilon_lower > audit(coins.astype(float), coins, guesses=40, delta=1e-5).epsilon_lower


def test_blind_guesses_prove_nothing() -> None:
    """Scores without information give a bound of zero."""
    coins = np.arange(100) % 4 < 2
    assert audit((np.arange(100) % 2).astype(float), coins, guesses=100, delta=1e-5).epsilon_lower == 0.0


def test_chance_counts_delta_per_canary() -> None:
    """One guess on one canary: the chance is that of the coin plus twice delta."""
    assert chance(1, 1, 1, 0.0, 0.01) == pytest.approx(0.5 + 2 * 0.01 * 0.5)


@pytest.mark.parametrize(("canaries", "guesses", "correct"), [(5, 6, 1), (5, 4, 5), (5, 4, -1)])
def test_impossible_counts_are_refused(canaries: int, guesses: int, correct: int) -> None:
    """More guesses than canaries, or more right than guessed, is a typed error."""
    with pytest.raises(EngineError):
        epsilon_lower_bound(canaries, guesses, correct, 1e-5)


def test_nan_scores_are_refused() -> None:
    """A score that is not a number stops the audit."""
    with pytest.raises(EngineError, match="not a number"):
        audit(np.array([np.nan, 1.0]), np.array([True, False]), guesses=2, delta=0.0)
