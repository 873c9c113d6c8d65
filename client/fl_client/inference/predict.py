"""Predictions of an adapter on texts, and its metrics on public records."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from fl_client.data.units import UnitData
from fl_client.dp.checks import check_layers
from fl_client.dp.engine import precision_of
from fl_client.dp.kernels import independent_rows
from fl_client.dp.records.packing import cut, pack
from fl_client.dp.records.records import Records, pad_ids
from fl_client.dp.start import adapted_for, load_offset
from fl_client.model.load import LoadedModel
from fl_client.model.tokens import token_ids
from fl_client.tasks.registry import task_of
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import DataError

_BATCH = 512  # units in a micro-batch


@dataclass(frozen=True)
class Evaluation:
    """How well public records are answered.

    Attributes:
        figures: the task's: accuracy and majority, say.
        n: number of records.
    """

    figures: Mapping[str, float]
    n: int


def predict(
    model: LoadedModel, offset: Mapping[str, NDArray[np.float32]], texts: Sequence[str], spec: RunSpec
) -> NDArray[np.float32]:
    """Outputs of seeded start + `offset`, float32 `[texts, ...]`: logits, say. As private as the texts are.

    The outputs of a text are the same bits whichever others are asked for beside it.

    Raises:
        ConfigError, EngineError: the adapter does not belong to model and spec, or the layers cannot be trusted.
    """
    ids, truncated = token_ids(texts, model.tokenizer, task_of(spec).max_tokens)
    nothing = np.zeros(len(ids), dtype=np.int64)
    return _answers(model, offset, Records(ids, nothing, (), truncated), spec)


def evaluate(
    model: LoadedModel,
    offset: Mapping[str, NDArray[np.float32]],
    texts: Sequence[str],
    labels: Sequence[str],
    spec: RunSpec,
) -> Evaluation:
    """The task's figures of seeded start + `offset` on public records. DataError when there are none."""
    if not texts or len(texts) != len(labels):
        raise DataError(f"{len(texts)} texts and {len(labels)} labels", fix="give one label per text, at least one")
    task = task_of(spec)
    data = UnitData(tuple(texts), tuple(labels), np.arange(len(texts)), len(texts), "")
    records = task.encode(data, model.tokenizer)
    return Evaluation(task.score(_answers(model, offset, records, spec), data), len(texts))


def _answers(
    model: LoadedModel, offset: Mapping[str, NDArray[np.float32]], records: Records, spec: RunSpec
) -> NDArray[np.float32]:
    """The outputs for every record, each a unit of its own."""
    task = task_of(spec)
    adapted = adapted_for(model, spec, task.objective)
    load_offset(adapted, spec, offset)
    check_layers(adapted, vocabulary=model.tokenizer.vocab_size, rows=task.max_tokens, engine=model.engine)
    adapted.module.eval()
    alone = dataclasses.replace(records, of_unit=tuple(np.arange(len(records.ids))[:, None]))
    outputs = np.zeros((len(records.ids), *adapted.module.head.shape), dtype=np.float32)
    with torch.no_grad(), independent_rows(model.device, precision_of(adapted)):
        if model.engine == "hooks":  # one by one, as it trains
            for row, ids in enumerate(records.ids):
                outputs[row] = adapted.module(*pad_ids([ids], model.device)).cpu().numpy()
            return outputs
        for chosen in cut(alone, range(alone.units), max_units=_BATCH, heights=adapted.heights):
            batch = pack(alone, chosen, model.device, heights=adapted.heights)
            outputs[[chosen[at] for at in batch.unit_of_record.tolist()]] = adapted.module.packed(batch).cpu().numpy()
    return outputs
