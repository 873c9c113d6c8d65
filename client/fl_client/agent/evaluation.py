"""`fl-client evaluate`: how an adapter does on the site's private hold-out units, as a mechanism of its own.

Each held-out unit contributes one vector (1, a, l): it is there; a is the share of its records that were answered
right; l is its mean loss, clipped to [0, L] and divided by L = 2 ln(number of labels). Every part lies in [0, 1],
so one unit changes the sum by at most sqrt(3) in L2, and discrete Gaussian noise of sigma sqrt(3) is added to it
(the grid of `fl_client.dp.mechanism.noise`). That is the Gaussian mechanism: sampling probability 1, one step. It is
reserved before a private text is read and settled with the digest of the figures before they are shown; accuracy and
mean loss are post-processing. A repeat for the same spec and adapter shows the same figures and spends nothing.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.agent.outgoing import EVALUATION, Outgoing
from fl_client.agent.releases import ReleaseStore
from fl_client.agent.site import OpenSite
from fl_client.data.load import require_labels, restrict_labels
from fl_client.data.units import UnitData
from fl_client.dp.mechanism.noise import discrete_gaussian, plan_grid
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.records.records import label_rows
from fl_client.site.files import write_durably
from fl_shared.adapters.safetensors import digest, require_finite, unpack
from fl_shared.canonical import canonical_bytes
from fl_shared.documents.base_model import absent_targets
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError, DataError, LedgerError, PolicyRefusal, RunError
from fl_shared.ledger.faults import fault
from fl_shared.ledger.records import Dataset
from fl_shared.ledger.service import Ledger
from fl_shared.ledger.suspension import FAILED_REASON, Suspensions, resume_command
from fl_shared.privacy.mechanism import Mechanism

SENSITIVITY = math.sqrt(3.0)
DIMENSIONS = 3
USABLE = 2.0
"""Figures are told when the noisy number of units exceeds this many standard deviations of its noise."""
SURELY_USABLE = 5.0
"""From this many on, expected from public numbers, they are told but once in 700 evaluations."""


def unit_vectors(logits: NDArray[np.float32], data: UnitData, labels: tuple[str, ...]) -> NDArray[np.float64]:
    """One row (1, a, l) a unit, float64 `[units, 3]`, every value in [0, 1] whatever the logits are."""
    truth = label_rows(data.labels, labels)
    scores = np.asarray(logits, dtype=np.float64)
    right = (scores.argmax(1) == truth).astype(np.float64)
    with np.errstate(all="ignore"):
        top = scores.max(1, keepdims=True)
        total = top[:, 0] + np.log(np.exp(scores - top).sum(1))
        loss = (total - scores[np.arange(len(truth)), truth]) / (2.0 * math.log(len(labels)))
    loss = np.clip(np.nan_to_num(loss, nan=1.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
    counts = np.bincount(data.unit_of_record, minlength=data.units)
    return np.stack(
        [
            np.ones(data.units),
            np.clip(np.bincount(data.unit_of_record, right, data.units) / counts, 0.0, 1.0),
            np.clip(np.bincount(data.unit_of_record, loss, data.units) / counts, 0.0, 1.0),
        ],
        axis=1,
    )


def noisy_sums(vectors: NDArray[np.float64], noise_multiplier: float, stream: SecureStream) -> list[float]:
    """The sums over the units on the noise's grid, with discrete Gaussian noise, float `[3]`."""
    grid = plan_grid(clipping_norm=SENSITIVITY, noise_multiplier=noise_multiplier, dimensions=DIMENSIONS, slack=0.0)
    sums = np.rint(vectors / grid.step).astype(np.int64).sum(0)  # integers: no unit changes another's rounding
    return [float(value * grid.step) for value in sums + discrete_gaussian(DIMENSIONS, grid, stream)]


def figures_of(sums: list[float], noise_multiplier: float, labels: int) -> dict[str, Any]:
    """Accuracy and mean loss from the noisy sums, with the noise's share of their error. Post-processing."""
    units, right, loss = sums
    deviation = noise_multiplier * SENSITIVITY
    usable = units > USABLE * deviation
    return {
        "noisy_sums": {"units": units, "right": right, "clipped_loss": loss},
        "noise_deviation": deviation,
        "accuracy": min(1.0, max(0.0, right / units)) if usable else None,
        "accuracy_deviation": deviation / units if usable else None,
        "mean_loss": min(1.0, max(0.0, loss / units)) * 2.0 * math.log(labels) if usable else None,
    }


@dataclass(frozen=True)
class _Request:
    """What is evaluated; `run` names it in the ledger."""

    spec: RunSpec
    adapter: bytes
    noise_multiplier: float

    @property
    def run(self) -> str:
        return f"evaluation:{self.spec.digest[7:19]}:{digest(self.adapter)[7:19]}"


def require_usable(expected: float, noise: float) -> None:
    """Raise ConfigError when noise would hide the figures of about `expected` units (a public number).

    It is asked before anything is charged, and looks at no data.
    """
    needed = SURELY_USABLE * noise * SENSITIVITY
    if expected < needed:
        raise ConfigError(
            f"about {expected:.0f} units are held out, and noise multiplier {noise:g} needs {needed:.0f} for usable "
            "figures; nothing was charged",
            fix=f"give --noise {expected / (SURELY_USABLE * SENSITIVITY):.2g} or less (it costs more), "
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
    from fl_client.training.round import predict, prepare_round

    offset = unpack(adapter)
    require_finite(offset)
    # What does not fit is said before anything is charged.
    most = config.policy.max_adapter_norm
    adapted = prepare_round(site.model, spec, offset, private=False, max_adapter_norm=most).adapted
    vocabulary, engine = site.model.tokenizer.vocab_size, site.model.engine
    check_layers(adapted, vocabulary=vocabulary, rows=spec.task.max_tokens, engine=engine)
    holdout = site.holdout
    if not force:
        # The number of units is public or replaced by a public one (docs/decisions/0023); who is held out is not.
        require_usable(config.data.holdout * (config.data.expected_units or site.dataset.units), noise)
    require_labels(holdout, spec.task.labels, "the hold-out")

    def compute(mechanism: Mechanism) -> dict[str, Any]:
        chosen = restrict_labels(holdout, spec.task.labels)
        logits = predict(site.model, offset, chosen.texts, spec)
        sums = noisy_sums(unit_vectors(logits, chosen, spec.task.labels), mechanism.noise_multiplier, SecureStream())
        return figures_of(sums, mechanism.noise_multiplier, len(spec.task.labels))

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
        mechanism = Mechanism(request.noise_multiplier, 1.0, 1, SENSITIVITY)
        held = ledger.reserve(dataset, mechanism, run=request.run, round=0, purpose=EVALUATION, retry=True)
        fault("evaluation.reserved")
        try:
            made = {
                "run": request.spec.run.name,
                "spec_digest": request.spec.digest,
                "adapter_digest": digest(request.adapter),
                "model_digest": request.spec.run.base_model,
                "mechanism": mechanism.to_dict(),
                "created_at": time.time(),
                **compute(mechanism),
            }
            figures = canonical_bytes(made)
            write_durably(path, figures)
        except Exception as error:  # anything may fail here, and the charge must not depend on what did
            ledger.charge_in_doubt(held, f"{type(error).__name__} {FAILED_REASON}")
            raise
        fault("evaluation.stored")
        entry = ledger.settle(held, mechanism, digest(figures))
    document: dict[str, Any] = json.loads(outgoing.evaluation(entry.id, site, request.run, figures).document)
    return document
