"""One round at a site: from the global adapter to a private update.

The adapter on the wire is the difference from the run's seeded start (docs/decisions/0001). `train_round` returns the
further difference that this site's data made; before any private text is read it has nothing but public numbers.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fl_client.data.units import UnitData
from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.checks import StepCheck, check_layers
from fl_client.dp.engine import DPEngine, EngineName, memory_errors_typed
from fl_client.dp.initial import initial_tensors
from fl_client.dp.magnitude import check_magnitude
from fl_client.dp.records.records import MAX_UNITS, Records
from fl_client.dp.shard import Shard
from fl_client.dp.start import adapted_for, frozen_tensors, load_offset
from fl_client.model.load import LoadedModel
from fl_client.tasks.cache import RecordCache
from fl_client.tasks.registry import task_of
from fl_client.training.public import train_public
from fl_shared.adapters.safetensors import Tensors
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import Mechanism

log = logging.getLogger("fl_client.training.round")


@dataclass(frozen=True)
class TrainingResult:
    """What a round made.

    Attributes:
        update: tensor name to float32 difference from the adapter that came in.
        executed: what was done to the data.
        report: figures (seconds, truncated texts, coverage of experts). Some are as private as the data: they are
            neither sent nor logged.
    """

    update: Tensors
    executed: Mechanism
    report: dict[str, Any]


@dataclass(frozen=True)
class Prepared:
    """A model at a round's start. Nothing in it depends on private data.

    Attributes:
        adapted: the model, with the global adapter in it.
        start: tensor name to what lies in it.
        frozen: trainable tensors that do not move in this run.
    """

    adapted: AdaptedModel
    start: Tensors
    frozen: frozenset[str]


def initial_adapter(model: LoadedModel, spec: RunSpec) -> Tensors:
    """The run's public start: the same at every site, from `spec.training.seed_adapter`."""
    return initial_tensors(adapted_for(model, spec, task_of(spec).objective), spec.training.seed_adapter)


@memory_errors_typed()
def prepare_round(
    model: LoadedModel,
    spec: RunSpec,
    offset: Mapping[str, NDArray[np.float32]],
    *,
    private: bool = True,
    max_adapter_norm: float = math.inf,
    records_per_unit: int = 1,
) -> Prepared:
    """The public half of a round: adapt the model, load seeded start + `offset`, check the layers, try the engine.

    It reads no private data, so whatever it raises may be told and costs nothing. `records_per_unit` is the most that
    the site's configuration allows.

    Raises:
        ConfigError: the adapter does not belong to model and spec. EngineError: a group of layers that the model
        does not have, layers whose per-unit gradients are not those of the batch-size-1 loop, or a mechanism that
        the engine cannot execute. PolicyRefusal: a factor is larger than `max_adapter_norm` times the base's weight.
    """
    task = task_of(spec)
    adapted = adapted_for(model, spec, task.objective)
    start = load_offset(adapted, spec, offset)
    frozen = frozen_tensors(adapted, spec)
    check_magnitude(adapted, max_adapter_norm)
    if private:
        rows = task.max_tokens * records_per_unit
        check_layers(adapted, vocabulary=model.tokenizer.vocab_size, rows=rows, engine=model.engine)
        asked = spec.training
        DPEngine(
            adapted,
            Records((), np.zeros(0, dtype=np.int64), (), 0),
            spec.mechanism(),
            learning_rate=asked.learning_rate,
            head_learning_rate=asked.head_learning_rate,
            momentum=asked.momentum,
            expected_batch=1.0,
            engine=model.engine,
            frozen=frozen,
        ).close()
    return Prepared(adapted, start, frozen)


@memory_errors_typed()
def train_round(
    model: LoadedModel,
    data: UnitData,
    spec: RunSpec,
    mechanism: Mechanism,
    offset: Mapping[str, NDArray[np.float32]],
    *,
    round: int,
    progress: Callable[..., None] | None = None,
    engine: EngineName | None = None,
    expected_batch: float | None = None,
    most_units: int | None = None,
    records_per_unit: int | None = None,
    max_units: int = MAX_UNITS,
    private: bool = True,
    shard: Shard | None = None,
    cache: RecordCache | None = None,
) -> TrainingResult:
    """Train `mechanism.steps` private steps from seeded start + `offset`.

    Args:
        model: the base; it stays loaded and unchanged between rounds.
        data: this site's records and units.
        spec: task, LoRA and learning rates.
        mechanism: what the ledger has reserved; exactly this is executed.
        offset: the global adapter as it came over the wire; empty in round 1.
        round: number of the round, for messages.
        progress: called as `progress(step=i, steps=n)` after every step; may raise to stop.
        engine: `book`, or `hooks` for Opacus' own per-sample gradients; the model's when left out.
        expected_batch: public constant that the noisy sum is divided by; q times `data.units` when left out, which
            then is public. With no unit at all it is needed, and the update is noise alone.
        most_units, records_per_unit: public bounds on units, and on records of each; the data's own figures when left
            out, which then are public: the grid of the noise follows from both, and can be read off an update.
        max_units: units in a micro-batch; halved when memory runs out.
        private: False trains without clipping and noise. Only for data that the site's policy declares public.
        shard: this process's share, when several processes of the site train together (private training only).
        cache: records of the round before, to be used again when data and task are the same.

    Raises:
        DataError: a record that the task cannot use. EngineError: anything that would make the result differ from what
        is charged, and memory that runs out. Nothing is returned then, and nothing may be released.
    """
    started = time.perf_counter()
    if records_per_unit is None:
        records_per_unit = int(np.bincount(data.unit_of_record).max()) if data.units else 1
    prepared = prepare_round(model, spec, offset, private=private, records_per_unit=records_per_unit)
    adapted, start, frozen = prepared.adapted, prepared.start, prepared.frozen
    records = (RecordCache() if cache is None else cache).of(task_of(spec), data, model.tokenizer)
    report: dict[str, Any] = {"round": round, "units": records.units, "truncated_texts": records.truncated}
    if private:
        runner = DPEngine(
            adapted,
            records,
            mechanism,
            learning_rate=spec.training.learning_rate,
            head_learning_rate=spec.training.head_learning_rate,
            momentum=spec.training.momentum,
            expected_batch=expected_batch,
            most_units=most_units,
            engine=engine or model.engine,
            frozen=frozen,
            max_units=max_units,
            shard=shard,
        )
        check = StepCheck(adapted, frozen)

        def after_step(number: int) -> None:
            check.after(number)
            if progress is not None:
                progress(step=number, steps=mechanism.steps)

        runner.run(after_step)
        executed = runner.executed()
        report |= runner.report()
    else:
        executed = train_public(adapted, records, mechanism, spec, frozen=frozen, progress=progress)
    update = {
        name: parameter.detach().float().cpu().numpy() - start[name]
        for name, parameter in adapted.trainable.items()
        if name not in frozen
    }
    for name, value in update.items():
        if not np.isfinite(value).all():
            raise EngineError(f"the update of {name} is not finite", fix="lower the learning rates")
    seconds = time.perf_counter() - started
    report |= {"seconds": seconds, "seconds_per_step": seconds / max(1, mechanism.steps)}
    log.info("round %d: %d steps in %.1f s", round, executed.steps, seconds)
    return TrainingResult(update, executed, report)
