"""Epsilon from below: how well could anyone guess which canaries a single training run held?

Steinke, Nasr and Jagielski 2023, "Privacy auditing with one (1) training run", arXiv 2305.08846. Each of m canaries
is put into the data by its own fair coin. Whoever sees the output guesses some of the coins and abstains on the rest.
If the run was (epsilon, delta)-DP, the number of right guesses is bounded (Theorem 5.2), so more right guesses than
that prove a larger epsilon, at a confidence that is fixed beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.stats import binom

from fl_shared.errors import EngineError

_HIGHEST = 60.0  # a logit beyond this is certainty in a double


@dataclass(frozen=True, slots=True)
class AuditResult:
    """What one run proves.

    Attributes:
        canaries: m, coins thrown.
        guesses: r, coins guessed.
        correct: v, guesses that were right.
        epsilon_lower: the run was not (epsilon, delta)-DP for any epsilon below this, at `confidence`; 0: no proof.
        best_possible: the bound if every guess had been right: the audit cannot accuse a claim above it.
    """

    canaries: int
    guesses: int
    correct: int
    delta: float
    confidence: float
    epsilon_lower: float
    best_possible: float


def chance(canaries: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """An upper bound on the chance of at least `correct` right guesses under (epsilon, delta)-DP.

    Theorem 5.2: `P[Binomial(r, q) >= v] + 2 m delta * max_i (P[v - i <= Binomial(r, q) < v] / i)`, `q` the logistic
    function of epsilon.
    """
    q = 1.0 / (1.0 + np.exp(-epsilon))
    tail = float(binom.sf(correct - 1, guesses, q))
    if delta == 0 or correct == 0:
        return min(1.0, tail)
    below = np.cumsum(binom.pmf(np.arange(correct - 1, -1, -1), guesses, q))
    worst = float(np.max(below / np.arange(1, correct + 1)))
    return min(1.0, tail + 2 * canaries * delta * worst)


def epsilon_lower_bound(canaries: int, guesses: int, correct: int, delta: float, confidence: float = 0.95) -> float:
    """The smallest epsilon that such good guesses leave possible.

    Args:
        canaries: m.
        guesses: r, at most m; chosen before the guesses are compared with the coins.
        correct: v, at most r.
        delta: of the claim.
        confidence: 1 minus the chance of accusing an honest run.

    Raises:
        EngineError: the counts do not fit.
    """
    if not (0 <= correct <= guesses <= canaries and 0 <= delta < 1 and 0 < confidence < 1):
        raise EngineError(
            f"{correct} right of {guesses} guesses on {canaries} canaries cannot be", fix="report this defect"
        )
    error = 1.0 - confidence

    def excess(epsilon: float) -> float:
        return chance(canaries, guesses, correct, epsilon, delta) - error

    if excess(0.0) >= 0:
        return 0.0
    if excess(_HIGHEST) < 0:
        return _HIGHEST
    return float(brentq(excess, 0.0, _HIGHEST, xtol=1e-9))


def audit(
    scores: NDArray[np.float64], included: NDArray[np.bool_], *, guesses: int, delta: float, confidence: float = 0.95
) -> AuditResult:
    """Guess "in" for the highest scores and "out" for the lowest, half of `guesses` each, and bound epsilon.

    Args:
        scores: `[m]`, made without looking at `included`; higher means more likely in.
        included: `[m]`, the coins.
        guesses: r, even, fixed beforehand: choosing it after seeing the coins would break the confidence.
    """
    canaries, half = len(scores), guesses // 2
    if scores.shape != included.shape or not 2 <= guesses <= canaries or guesses % 2:
        raise EngineError(f"{guesses} guesses for {canaries} canaries", fix="guess an even number, at most as many")
    if not np.isfinite(scores).all():
        raise EngineError("a canary's score is not a number", fix="report this defect")
    order = np.argsort(scores, kind="stable")
    correct = int(included[order[-half:]].sum() + (~included[order[:half]]).sum())
    return AuditResult(
        canaries=canaries,
        guesses=guesses,
        correct=correct,
        delta=delta,
        confidence=confidence,
        epsilon_lower=epsilon_lower_bound(canaries, guesses, correct, delta, confidence),
        best_possible=epsilon_lower_bound(canaries, guesses, guesses, delta, confidence),
    )
