"""The base model alone: each text gets the label whose title lies nearest in feature space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from fl_client.inference.predict import Evaluation
from fl_client.model.features import pooled_features
from fl_client.model.load import LoadedModel
from fl_client.tasks.classification import Classification
from fl_client.tasks.registry import task_of
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError


def nearest_title(model: LoadedModel, texts: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    """A label for every text, by cosine similarity of standardised mean-pooled features. Nothing is trained."""

    def embed(rows: list[str]) -> Tensor:
        standardised = (pooled_features(model, rows) - model.feature_mean.cpu()) / model.feature_std.cpu()
        return F.normalize(standardised, dim=-1)

    labels = list(titles)
    nearest = (embed(list(texts)) @ embed(list(titles.values())).T).argmax(1)
    return [labels[int(index)] for index in nearest]


def evaluate_zero_shot(
    model: LoadedModel, texts: Sequence[str], labels: Sequence[str], titles: Mapping[str, str], spec: RunSpec
) -> Evaluation:
    """Accuracy of `nearest_title` on public records, at least one, with labels of the run.

    Args:
        titles: of labels; a label without one is its own.

    Raises:
        ConfigError: the run's task has no labels.
    """
    task = task_of(spec)
    if not isinstance(task, Classification):
        raise ConfigError(f"--zero-shot compares labels, and [task] kind is {spec.task.kind!r}", fix="give --adapter")
    guesses = nearest_title(model, texts, {label: titles.get(label, label) for label in task.labels})
    accuracy = sum(guess == label for guess, label in zip(guesses, labels, strict=True)) / len(labels)
    majority = max(labels.count(label) for label in set(labels)) / len(labels)
    return Evaluation({"accuracy": accuracy, "majority": majority}, len(labels))
