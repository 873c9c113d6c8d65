"""`fl-client evaluate`: how an adapter does on the site's private hold-out units, as a mechanism of its own.

Each held-out unit contributes one vector (1, m...): it is there; m is what the run's task measures of it, two numbers
for classification: right answers and clipped loss. Every part lies in [0, 1], so one unit changes the sum of vectors
of D parts by at most sqrt(D) in L2, and discrete Gaussian noise of sigma sqrt(D) is added to it (the grid of
`fl_client.dp.mechanism.noise`). That is the Gaussian mechanism: sampling probability 1, one step. It is reserved
before a private text is read and settled with the digest of the figures before they are shown; the task's figures are
post-processing. A repeat for the same spec and adapter shows the same figures and spends nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.agent.outgoing import EVALUATION, Outgoing
from fl_client.agent.releases import ReleaseStore
from fl_client.agent.site import OpenSite
from fl_client.data.units import UnitData
from fl_client.dp.mechanism.noise import choose_grid, discrete_gaussian
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.tasks.registry import task_of
from fl_client.tasks.task import Task, require_usable, usable
from fl_shared.adapters.safetensors import digest, require_finite, unpack
from fl_shared.canonical import canonical_bytes
from fl_shared.documents.base_model import absent_targets
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError, DataError, EngineError, LedgerError, PolicyRefusal, RunError
from fl_shared.files import write_durably
from fl_shared.ledger.faults import fault
from fl_shared.ledger.records import Dataset
from fl_shared.ledger.service import Ledger
from fl_shared.ledger.suspension import FAILED_REASON, Suspensions, resume_command
from fl_shared.privacy.mechanism import Mechanism

USABLE = 2.0
"""Figures are told when the noisy number of units exceeds this many standard deviations of its noise."""
SURELY_USABLE = 5.0
"""From this many on, expected from public numbers, they are told but once in 700 evaluations."""


def sensitivity_of(task: Task) -> float:
    """The most that one unit changes the sum of vectors, in L2."""
    return math.sqrt(1 + len(task.measures))


def unit_vectors(task: Task, outputs: NDArray[np.float32], data: UnitData) -> NDArray[np.float64]:
    """One row (1, m...) a unit, float64 `[units, D]`, every value in [0, 1] whatever the task says.

    Raises:
        EngineError: the task does not give its measures for each unit.
    """
    measured = task.measure(outputs, data)
    if measured.shape != (data.units, len(task.measures)):
        raise EngineError(f"{type(task).__name__} measures {measured.shape[1:]}", fix="report this defect")
    bounded = np.clip(np.nan_to_num(measured.astype(np.float64), nan=0.0), 0.0, 1.0)
    return np.concatenate([np.ones((data.units, 1)), bounded], axis=1)


def noisy_sums(vectors: NDArray[np.float64], noise_multiplier: float, stream: SecureStream) -> list[float]:
    """The sums over the units on the noise's grid, with discrete Gaussian noise, float `[D]`."""
    parts = vectors.shape[1]
    grid = choose_grid(clipping_norm=math.sqrt(parts), noise_multiplier=noise_multiplier, dimensions=parts, slack=0.0)
    sums = np.rint(vectors / grid.step).astype(np.int64).sum(0)  # integers: no unit changes another's rounding
    return [float(value * grid.step) for value in sums + discrete_gaussian(parts, grid, stream)]


def figures_of(task: Task, sums: Sequence[float], noise_multiplier: float) -> dict[str, Any]:
    """The task's figures from the noisy sums, with the noise's share of their error. Post-processing."""
    units, *measured = sums
    noisy = {"units": units, **dict(zip(task.measures, measured, strict=True))}
    deviation = noise_multiplier * sensitivity_of(task)
    raw = {"noisy_sums": noisy, "noise_deviation": deviation}
    if not are_usable(raw):
        return raw | task.figures(None, None)
    return raw | task.figures([min(1.0, max(0.0, value / units)) for value in measured], deviation / units)


def are_usable(figures: Mapping[str, Any]) -> bool:
    """Whether the noisy number of units says enough for the task's figures to be told."""
    return bool(figures["noisy_sums"]["units"] > USABLE * figures["noise_deviation"])


@dataclass(frozen=True)
class _Request:
    """What is evaluated; `run` names it in the ledger."""

    spec: RunSpec
    adapter: bytes
    noise_multiplier: float

    @property
    def run(self) -> str:
        return f"evaluation:{self.spec.digest[7:19]}:{digest(self.adapter)[7:19]}"


def require_enough(task: Task, expected: float, noise: float) -> None:
    """Raise ConfigError when noise would hide the figures of about `expected` units (a public number).

    It is asked before anything is charged, and looks at no data.
    """
    sensitivity = sensitivity_of(task)
    needed = SURELY_USABLE * noise * sensitivity
    if expected < needed:
        raise ConfigError(
            f"about {expected:.0f} units are held out, and noise multiplier {noise:g} needs {needed:.0f} for usable "
            "figures; nothing was charged",
            fix=f"give --noise {expected / (SURELY_USABLE * sensitivity):.2g} or less (it costs more), "
            "or hold out more units before the first training, or --force to be charged all the same",
        )


def evaluate_privately(
    site: OpenSite, spec: RunSpec, adapter: bytes, noise: float, *, force: bool = False
) -> dict[str, Any]:
    """Evaluate `adapter` on the hold-out units; return the signed document that may be shown.

    Raises ConfigError without a hold-out, or when the noise would hide the figures (unless `force`), PolicyRefusal for
    too little noise, DataError for another base model or a damaged adapter, RunError when the same evaluation failed
    and nobody has confirmed, BudgetExhausted. Whatever fails after the reservation is charged in full.
    """
    request = _Request(spec, adapter, noise)
    config = site.config
    if site.holdout is None:
        raise ConfigError("this site holds nothing out", fix="set [data] holdout, e.g. 0.2, before the first training")
    if not noise > 0 or not math.isfinite(noise):
        raise ConfigError(f"noise multiplier {noise!r} is not usable", fix="give --noise a number above 0")
    least = site.config.policy.min_noise_multiplier
    if not noise >= least:
        raise PolicyRefusal(f"noise multiplier {noise:g} < {least:g}", fix=f"give --noise {least:g} or more")
    if spec.run.base_model != site.model.digest:
        raise DataError(
            f"the spec is for base model {spec.run.base_model}, this site has {site.model.digest}",
            fix="evaluate with the spec that the adapter was trained with",
        )
    if absent := absent_targets(spec, site.facts.targets):
        raise DataError(absent, fix="evaluate with the spec that the adapter was trained with")
    from fl_client.dp.checks import check_layers  # torch
    from fl_client.inference.predict import predict
    from fl_client.training.round import prepare_round

    task = task_of(spec)
    offset = unpack(adapter)
    require_finite(offset)
    # What does not fit is said before anything is charged.
    most = config.policy.max_adapter_norm
    adapted = prepare_round(site.model, spec, offset, private=False, max_adapter_norm=most).adapted
    vocabulary, engine = site.model.tokenizer.vocab_size, site.model.engine
    check_layers(adapted, vocabulary=vocabulary, rows=task.max_tokens, engine=engine)
    holdout = site.holdout
    if not force:
        # The number of units is public or replaced by a public one (docs/decisions/0023); who is held out is not.
        require_enough(task, config.data.holdout * (config.data.expected_units or site.dataset.units), noise)
    require_usable(task, holdout, "the hold-out")

    def compute(mechanism: Mechanism) -> dict[str, Any]:
        chosen = usable(task, holdout)
        outputs = predict(site.model, offset, chosen.texts, spec)
        sums = noisy_sums(unit_vectors(task, outputs, chosen), mechanism.noise_multiplier, SecureStream())
        return figures_of(task, sums, mechanism.noise_multiplier)

    return _charged(site.ledger, site.outgoing, site.dataset, site.store, request, site.config.site, compute)


def _charged(
    ledger: Ledger,
    outgoing: Outgoing,
    dataset: Dataset,
    store: ReleaseStore,
    request: _Request,
    site: str,
    compute: Callable[[Mechanism], dict[str, Any]],
) -> dict[str, Any]:
    """Reserve, compute, keep, settle, seal; or seal again what was settled before."""
    path = store.figures_path(request.run)
    settled = [spend for spend in ledger.spends(run=request.run) if spend.outcome == "settled"]
    if settled:
        entry = ledger.entry(settled[-1].settled_seq or 0)
        try:
            figures = path.read_bytes()
        except OSError:
            raise LedgerError(
                f"this was evaluated and charged (entry {entry.seq}), but {path} is gone",
                fix="restore it from a backup; another adapter can be evaluated",
            ) from None
        named = json.loads(figures)
        if (named["spec_digest"], named["adapter_digest"]) != (request.spec.digest, digest(request.adapter)):
            raise LedgerError(
                f"{path} holds the figures of another spec or adapter whose digest begins alike",
                fix="change the spec in one place, for example [run] name, and evaluate that",
            )
    else:
        if why := Suspensions(ledger).of(request.run):
            raise RunError(
                f"this evaluation is suspended: {why}",
                fix=f"look into the log, then: {resume_command(site, request.run)}",
            )
        mechanism = Mechanism(request.noise_multiplier, 1.0, 1, sensitivity_of(task_of(request.spec)))
        reservation = ledger.reserve(dataset, mechanism, run=request.run, round=0, purpose=EVALUATION, retry=True)
        fault("evaluation.reserved")
        try:
            body = {
                "run": request.spec.run.name,
                "spec_digest": request.spec.digest,
                "adapter_digest": digest(request.adapter),
                "model_digest": request.spec.run.base_model,
                "mechanism": mechanism.to_dict(),
                "created_at": time.time(),
                **compute(mechanism),
            }
            figures = canonical_bytes(body)
            write_durably(path, figures)
        except Exception as error:  # anything may fail here, and the charge must not depend on what did
            ledger.charge_in_doubt(reservation, f"{type(error).__name__} {FAILED_REASON}")
            raise
        fault("evaluation.stored")
        entry = ledger.settle(reservation, mechanism, digest(figures))
    document: dict[str, Any] = json.loads(outgoing.evaluation(entry.id, site, request.run, figures).document)
    return document
