"""The base model alone: each text gets the label whose title lies nearest in feature space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch import Tensor
from torch.nn import functional as F

from fl_client.model.features import pooled_features
from fl_client.model.load import LoadedModel


def nearest_title(model: LoadedModel, texts: Sequence[str], titles: Mapping[str, str]) -> list[str]:
    """A label for every text, by cosine similarity of standardised mean-pooled features. Nothing is trained."""

    def embed(rows: list[str]) -> Tensor:
        standardised = (pooled_features(model, rows) - model.feature_mean.cpu()) / model.feature_std.cpu()
        return F.normalize(standardised, dim=-1)

    labels = list(titles)
    nearest = (embed(list(texts)) @ embed(list(titles.values())).T).argmax(1)
    return [labels[int(index)] for index in nearest]
