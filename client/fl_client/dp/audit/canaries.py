"""Audit the engine itself: train once on canaries whose presence was decided by coins, then guess the coins.

The guesser is the strongest one that the trust model knows: a coordinator that chooses the global adapter, orders
rounds of one step, so that every noisy sum reaches it, and knows every record except which of them are there. Two
kinds of canaries:

- *record canaries* pass through the whole engine: tokeniser's ids, model, book, clipping, sampler, noise;
- *gradient canaries* stand in for units whose clipped gradient is one coordinate. They reach only sampler, sum and
  noise, but there can be as many as coordinates, which gives the audit its power. Only a site can put them in.

The report says what the run proves, and which faults an audit of this size could have proven.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.audit.one_run import AuditResult, audit, chance
from fl_client.dp.engine import DPEngine
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.objective import Objective, losses_of
from fl_client.dp.records.records import Records, pack_units
from fl_shared.errors import EngineError
from fl_shared.privacy.accounting import pld_epsilon
from fl_shared.privacy.mechanism import Mechanism

MAX_FLOATS = 1 << 29  # 2 GiB of canary gradients
_RATE = 0.0  # the parameters stay where they are, whatever the clipping norm: the guesser's gradients hold throughout
_POWER_RUNS = 100

Progress = Callable[[str, int, int], None]
"""(what, done, total)"""


def _quiet(_what: str, _done: int, _total: int) -> None:
    return


@dataclass(frozen=True, slots=True)
class Fault:
    """A way to be wrong, as the guesser's scores would see it.

    Attributes:
        noise: the noise's scale over the claimed one.
        size: a unit's contribution over the clipping norm.
        shuffled: each unit comes a fixed number of times instead of by chance.
    """

    noise: float = 1.0
    size: float = 1.0
    shuffled: bool = False


FAULTS: Mapping[str, Fault] = {
    "no noise": Fault(noise=1e-6),
    "noise at half scale": Fault(noise=0.5),
    "clipping per token, 8 tokens": Fault(size=8.0),
    "experts left out of the clipping, norm 4 C": Fault(size=4.0),
    "no clipping, norm 10 C": Fault(size=10.0),
    "shuffled batches": Fault(shuffled=True),
}


@dataclass(frozen=True, slots=True)
class CanaryReport:
    """One audit.

    Attributes:
        kind: `records` or `gradients`.
        claimed_epsilon: by PLD, at the audit's delta, for the mechanism that was run.
        result: what the run proves.
        accused: the proof contradicts the claim.
        power: fault to the chance that an audit of this size accuses it; `none` is the chance of a false alarm.
    """

    kind: str
    mechanism: Mechanism
    claimed_epsilon: float
    result: AuditResult
    accused: bool
    power: dict[str, float]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": self.kind,
            "mechanism": self.mechanism.to_dict(),
            "claimed_epsilon": self.claimed_epsilon,
            "accused": self.accused,
            "power": self.power,
        } | dataclasses.asdict(self.result)


def random_records(
    count: int, *, vocabulary: int, tokens: int, objective: Objective, rng: np.random.Generator
) -> Records:
    """Canary units of one record each: random ids and targets. They resemble nothing, so they overlap little."""
    ids = rng.integers(0, vocabulary, (count, tokens))
    return Records(
        tuple(tuple(int(i) for i in row) for row in ids),
        objective.random_targets(count, rng),
        tuple(np.array([unit]) for unit in range(count)),
        0,
    )


def worst_case_adapter(adapted: AdaptedModel, rng: np.random.Generator, scale: float = 0.2) -> None:
    """Set every trainable tensor to random values, as a hostile coordinator may: no gradient vanishes."""
    for parameter in adapted.trainable.values():
        values = scale * rng.standard_normal(tuple(parameter.shape))
        parameter.data = torch.from_numpy(values.astype(np.float32)).to(parameter.device)


def most_records(adapted: AdaptedModel) -> int:
    """How many record canaries' gradients fit into memory."""
    return MAX_FLOATS // adapted.dimensions


def audit_records(
    adapted: AdaptedModel,
    records: Records,
    mechanism: Mechanism,
    *,
    guesses: int,
    delta: float,
    confidence: float = 0.95,
    engine: type[DPEngine] = DPEngine,
    coins: SecureStream | None = None,
    progress: Progress = _quiet,
) -> CanaryReport:
    """Run the real engine on the canaries that the coins chose; guess the coins from the released sums.

    Args:
        adapted: the model; its trainable tensors stay as they are.
        records: one canary per unit.
        guesses: even, fixed beforehand.
        engine: what is audited; tests hand over engines that are broken on purpose.
        coins: only tests pass a stream.

    Raises:
        EngineError: the canaries' gradients would not fit into memory.
    """
    count = records.units
    if count > most_records(adapted):
        raise EngineError(
            f"{count} canaries of {adapted.dimensions} coordinates do not fit into memory",
            fix=f"take at most {most_records(adapted)} canaries, or a smaller LoRA rank",
        )
    gradients = clipped_gradients(adapted, records, mechanism.clipping_norm, progress=progress)
    included = (coins or SecureStream()).words(count) % np.uint64(2) == 1
    chosen = tuple(records.of_unit[unit] for unit in np.flatnonzero(included))
    trainer = _trainer(engine, adapted, dataclasses.replace(records, of_unit=chosen), mechanism)
    released = _listen(trainer)
    trainer.run(lambda number: progress("steps", number, mechanism.steps))
    scores = _decode(gradients, released[0], mechanism, _blocks(adapted))
    result = audit(scores, included, guesses=guesses, delta=delta, confidence=confidence)
    return _report("records", mechanism, result, _separation(gradients, mechanism), progress)


def audit_gradients(
    adapted: AdaptedModel,
    mechanism: Mechanism,
    *,
    canaries: int,
    guesses: int,
    delta: float,
    confidence: float = 0.95,
    engine: type[DPEngine] = DPEngine,
    coins: SecureStream | None = None,
    progress: Progress = _quiet,
) -> CanaryReport:
    """The same with canaries whose clipped gradient is one coordinate each, at the bound C.

    Raises:
        EngineError: more canaries than coordinates.
    """
    dimensions = adapted.dimensions
    if canaries > dimensions:
        raise EngineError(f"{canaries} gradient canaries for {dimensions} coordinates", fix="use fewer canaries")
    included = (coins or SecureStream()).words(canaries) % np.uint64(2) == 1
    owners = np.flatnonzero(included)
    nothing = Records((), np.empty(0, dtype=np.int64), tuple(np.empty(0, dtype=np.int64) for _ in owners), 0)
    trainer = _trainer(engine, adapted, nothing, mechanism)
    released = _listen(trainer)
    try:
        for number, sampled in enumerate(trainer.sampler, start=1):
            total = torch.zeros(dimensions)
            total[owners[sampled]] = mechanism.clipping_norm
            trainer.optimizer.zero_grad(set_to_none=True)
            at = 0
            for parameter in trainer.optimizer.params:
                part = total[at : at + parameter.numel()]
                parameter.summed_grad = part.view_as(parameter).to(parameter.device)
                at += parameter.numel()
            trainer.optimizer.step()
            progress("steps", number, mechanism.steps)
    finally:
        trainer.close()
    scores = released[0][:canaries]
    result = audit(scores, included, guesses=guesses, delta=delta, confidence=confidence)
    return _report("gradients", mechanism, result, 1.0 / mechanism.noise_multiplier, progress)


def _trainer(engine: type[DPEngine], adapted: AdaptedModel, records: Records, mechanism: Mechanism) -> DPEngine:
    """The engine that is audited; its parameters stay where they are, and its sums are not scaled."""
    return engine(
        adapted, records, mechanism,
        learning_rate=_RATE, head_learning_rate=_RATE, momentum=0.0, expected_batch=1.0,
    )  # fmt: skip


def clipped_gradients(
    adapted: AdaptedModel, records: Records, clipping_norm: float, *, progress: Progress = _quiet
) -> NDArray[np.float32]:
    """What each unit should contribute, by a loop over single units and plain autograd: `[units, d]`.

    Shares nothing with the engine but the model and the loss.
    """
    parameters = [p for p in adapted.trainable.values() if p.requires_grad]
    rows = np.empty((records.units, sum(p.numel() for p in parameters)), dtype=np.float32)
    scope = adapted.scope
    scope.mode, scope.book = "plain", None
    for unit in range(records.units):
        batch = pack_units(records, [unit], parameters[0].device)
        loss = losses_of(adapted.objective, adapted.module(batch.ids, batch.mask), batch.targets).sum()
        grads = torch.autograd.grad(loss, parameters)
        row = torch.cat([g.reshape(-1) for g in grads]).cpu().numpy().astype(np.float64)
        rows[unit] = row * min(1.0, clipping_norm / max(float(np.linalg.norm(row)), 1e-30))
        progress("canaries", unit + 1, records.units)
    return rows


def _blocks(adapted: AdaptedModel) -> list[slice]:
    """Runs of coordinates of one group, in the order of the trainable tensors."""
    runs: list[tuple[str, int, int]] = []
    at = 0
    for name, parameter in adapted.trainable.items():
        group, end = adapted.groups[name], at + parameter.numel()
        if runs and runs[-1][0] == group:
            runs[-1] = (group, runs[-1][1], end)
        else:
            runs.append((group, at, end))
        at = end
    return [slice(start, end) for _, start, end in runs]


def _listen(engine: DPEngine) -> list[NDArray[np.float64]]:
    """Add up the noisy sums of all steps, as whoever receives rounds of one step can; one array in a list."""
    optimizer = engine.optimizer
    heard = [np.zeros(optimizer.dimensions)]
    account: Callable[[Any], None] | None = optimizer.step_hook

    def hook(stepped: Any) -> None:
        flat = torch.cat([p.grad.reshape(-1).double().cpu() for p in stepped.params])
        heard[0] += flat.numpy() * stepped.expected_batch_size
        if account is not None:
            account(stepped)

    optimizer.attach_step_hook(hook)
    return heard


def _decode(
    gradients: NDArray[np.float32], released: NDArray[np.float64], mechanism: Mechanism, blocks: list[slice]
) -> NDArray[np.float64]:
    """Estimate how often each canary was in: damped least squares per block of coordinates, added by precision.

    The guesser trusts neither the claimed noise nor the clipping, nor that all blocks (attention, shared experts,
    routed experts, head) were treated alike: in each block, what lies outside the canaries' span tells the noise,
    and what lies inside tells the size of the contributions.
    """
    q, steps = mechanism.sampling_probability, mechanism.steps
    spread = steps * q * (1 - q) / 2 + (steps * q) ** 2 / 4
    claimed = steps * (mechanism.noise_multiplier * mechanism.clipping_norm) ** 2
    scores = np.zeros(gradients.shape[0])
    for block in blocks:
        rows = gradients[:, block].astype(np.float64)
        heard = released[block]
        values, vectors = np.linalg.eigh(rows @ rows.T)
        real = values > 1e-9 * max(values[-1], 1e-300)
        values, vectors = values[real], vectors[:, real]
        met = vectors.T @ (rows @ heard)
        inside = float((met**2 / values).sum())
        noise = max(float(heard @ heard) - inside, 0.0) / max(1, heard.size - values.size)
        real_spread = max(spread, (inside - noise * values.size) / float(values.sum()))
        estimate = vectors @ (met / (values + noise / real_spread + 1e-12 * values[-1]))
        known = (vectors**2) @ (values / (values + claimed / spread))  # share of the prior's spread that is resolved
        scores += estimate * known / np.maximum(1 - known, 1e-12)
    return scores


def _separation(gradients: NDArray[np.float32], mechanism: Mechanism) -> float:
    """How many standard deviations of one step's noise a canary moves its own estimate, the others unknown."""
    rows = gradients.astype(np.float64)
    values, vectors = np.linalg.eigh(rows @ rows.T)
    noise = (mechanism.noise_multiplier * mechanism.clipping_norm) ** 2
    known = (vectors**2) @ (np.maximum(values, 0) / (np.maximum(values, 0) + 4 * noise))
    return float(np.median(np.sqrt(4 * known / (1 - known))))


def _report(
    kind: str, mechanism: Mechanism, result: AuditResult, separation: float, progress: Progress
) -> CanaryReport:
    claimed = pld_epsilon([mechanism], result.delta)
    chances: dict[str, float] = {}
    for number, (name, fault) in enumerate({"none": Fault(), **FAULTS}.items(), start=1):
        seen = dataclasses.replace(fault, size=1.0) if kind == "gradients" else fault  # they bypass the clipping
        chances[name] = power(seen, mechanism, result, separation, claimed)
        progress("power", number, len(FAULTS) + 1)
    return CanaryReport(kind, mechanism, claimed, result, result.epsilon_lower > claimed, chances)


def power(fault: Fault, mechanism: Mechanism, planned: AuditResult, separation: float, claimed: float) -> float:
    """Chance that an audit of this size accuses an engine with this fault, by simulation of its scores.

    Args:
        planned: gives m, r, delta and confidence.
        separation: of one canary in one step, in standard deviations of the claimed noise.
    """
    needed = fewest_to_accuse(planned, claimed)
    rng = np.random.default_rng(0)
    steps, q, half = mechanism.steps, mechanism.sampling_probability, planned.guesses // 2
    accused = 0
    for _ in range(_POWER_RUNS):
        included = rng.random(planned.canaries) < 0.5
        drawn = rng.binomial(steps, q, planned.canaries)
        times = np.full(planned.canaries, round(steps * q)) if fault.shuffled else drawn
        noise = fault.noise * math.sqrt(steps) * rng.standard_normal(planned.canaries)
        order = np.argsort(fault.size * separation * times * included + noise)
        accused += int(included[order[-half:]].sum() + (~included[order[:half]]).sum()) >= needed
    return accused / _POWER_RUNS


def fewest_to_accuse(planned: AuditResult, claimed: float) -> int:
    """How many right guesses prove more than the claim; one more than the guesses when none would."""
    low, high = 0, planned.guesses + 1
    while low < high:
        middle = (low + high) // 2
        accuses = chance(planned.canaries, planned.guesses, middle, claimed, planned.delta) < 1 - planned.confidence
        low, high = (low, middle) if accuses else (middle + 1, high)
    return low
