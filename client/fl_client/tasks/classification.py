"""Classification: each text gets one of the run's public labels; the loss is cross entropy over a pooled linear head.

Measured are right answers and clipped losses: of each unit, the share of its records that were answered right, and
its records' mean loss, clipped to [0, L] and divided by L = 2 ln(number of labels).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from fl_client.data.spellings import run_labels
from fl_client.data.units import UnitData
from fl_client.dp.layers.head import PooledLinear
from fl_client.dp.layers.scope import BatchScope
from fl_client.dp.records.records import Records
from fl_client.model.tokens import token_ids
from fl_shared.documents.spec import TaskSection
from fl_shared.errors import DataError


@dataclass(frozen=True)
class CrossEntropy:
    """The objective: cross entropy of so many classes over a pooled linear head. Targets are rows of the head."""

    classes: int

    def head(self, mean: Tensor, std: Tensor, scope: BatchScope) -> PooledLinear:
        """Pooled features to one logit for each class."""
        return PooledLinear(mean, std, self.classes, scope)

    def losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """Logits `[B, C]` and rows `[B]` to losses `[B]`."""
        return F.cross_entropy(outputs.float(), targets, reduction="none")

    def random_targets(self, count: int, chance: np.random.Generator) -> NDArray[np.int64]:
        """Uniform rows `[count]`."""
        return chance.integers(0, self.classes, size=count)


@dataclass(frozen=True)
class Classification:
    """The task; `labels` are public, and their order fixes the head's rows."""

    labels: tuple[str, ...]
    max_tokens: int

    measures: ClassVar[tuple[str, ...]] = ("right", "clipped_loss")

    @classmethod
    def of(cls, section: TaskSection) -> Classification:
        """From a spec's `[task]`."""
        return cls(section.labels, section.max_tokens)

    @property
    def objective(self) -> CrossEntropy:
        """Cross entropy over the labels."""
        return CrossEntropy(len(self.labels))

    @property
    def requirement(self) -> str:
        """One of the first labels."""
        return f"has one of the spec's labels: {', '.join(map(repr, self.labels[:20]))}"

    def accepted(self, cells: Sequence[str]) -> tuple[str | None, ...]:
        """Labels of the run, also where the site spells them otherwise."""
        return run_labels(cells, self.labels)

    def report(self, data: UnitData) -> str:
        """How many rows have one of the labels, and which labels no row has."""
        accepted = self.accepted(data.labels)
        used = sum(label is not None for label in accepted)
        respelled = sum(label is not None and label != own for label, own in zip(accepted, data.labels, strict=True))
        absent = [label for label in self.labels if label not in set(accepted)]
        parts = [f"{used} of {len(accepted)} used rows have one of the spec's {len(self.labels)} labels"]
        if respelled:
            parts.append(f"{respelled} of them in another spelling")
        if absent:
            parts.append(f"no row has {', '.join(map(repr, absent[:20]))}{' and others' if len(absent) > 20 else ''}")
        return "; ".join(parts)

    def encode(self, data: UnitData, tokenizer: Any) -> Records:
        """Targets are the rows of the labels; DataError when a label is outside the public set."""
        ids, truncated = token_ids(data.texts, tokenizer, self.max_tokens)
        return Records(ids, self._rows(data.labels), tuple(data.records_by_unit()), truncated)

    def measure(self, outputs: NDArray[np.float32], data: UnitData) -> NDArray[np.float64]:
        """From logits `[records, C]`: share of right answers, and mean clipped loss over L, `[units, 2]`."""
        truth = self._rows(data.labels)
        scores = np.asarray(outputs, dtype=np.float64)
        right = (scores.argmax(1) == truth).astype(np.float64)
        with np.errstate(all="ignore"):
            top = scores.max(1, keepdims=True)
            total = top[:, 0] + np.log(np.exp(scores - top).sum(1))
            loss = (total - scores[np.arange(len(truth)), truth]) / self._most_loss
        loss = np.clip(np.nan_to_num(loss, nan=1.0, posinf=1.0, neginf=0.0), 0.0, 1.0)
        counts = np.bincount(data.unit_of_record, minlength=data.units)
        means = [np.bincount(data.unit_of_record, value, data.units) / counts for value in (right, loss)]
        return np.clip(np.stack(means, axis=1), 0.0, 1.0)

    def figures(self, means: Sequence[float] | None, deviation: float | None) -> dict[str, Any]:
        """Accuracy, with the noise's share of its error, and mean clipped loss."""
        if means is None:
            return {"accuracy": None, "accuracy_deviation": None, "mean_loss": None}
        right, loss = means
        return {"accuracy": right, "accuracy_deviation": deviation, "mean_loss": loss * self._most_loss}

    def summary(self, figures: dict[str, Any]) -> str:
        """Accuracy and loss."""
        return (
            f"accuracy {figures['accuracy']:.3f} (noise {figures['accuracy_deviation']:.3f}), "
            f"mean clipped loss {figures['mean_loss']:.3f}"
        )

    def score(self, outputs: NDArray[np.float32], data: UnitData) -> dict[str, float]:
        """Share of right answers, and share of the commonest label."""
        truth = self._rows(data.labels)
        right = int((outputs.argmax(1) == truth).sum())
        return {"accuracy": right / len(truth), "majority": int(np.bincount(truth).max()) / len(truth)}

    def head_metadata(self) -> dict[str, Any]:
        """The label of each row of the head, and what the head reads."""
        return {"labels": list(self.labels), "pooling": "mean over real tokens, standardised"}

    @property
    def _most_loss(self) -> float:
        return 2.0 * math.log(len(self.labels))

    def _rows(self, labels: Sequence[str]) -> NDArray[np.int64]:
        """The head's row of each label; DataError names the record's number, never its label."""
        rows = {label: row for row, label in enumerate(self.labels)}
        for record, label in enumerate(labels):
            if label not in rows:
                raise DataError(
                    f"record {record + 1} has a label outside the run's {len(self.labels)} labels",
                    fix="map the label column to the run's public label set, or leave the record out",
                )
        return np.array([rows[label] for label in labels], dtype=np.int64)
