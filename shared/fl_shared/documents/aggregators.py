"""The aggregators that a run may name, the parameters of each, and what each needs of the quorum.

The names stand in `[run] aggregation`, the parameters in `[aggregation]`. Both sides read them: the coordinator
averages by them, and a site learns from the name which tensors it trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from fl_shared.declaration import Document
from fl_shared.errors import ConfigError
from fl_shared.fields import Between, Whole

Parameters = tuple[tuple[str, float], ...]


@dataclass(frozen=True)
class NoParameters(Document):
    """[aggregation] of a rule that has no parameters."""


@dataclass(frozen=True)
class FedAvgM(Document):
    """[aggregation] of `fedavgm`: averaging with momentum at the coordinator (Hsu et al. 2019, arXiv 1909.06335)."""

    server_learning_rate: Annotated[float, Between(0, 1000, above=True)] = 1.0
    """What the round's mean update is multiplied with."""
    server_momentum: Annotated[float, Between(0, 1, below=True)] = 0.9
    """The share of the last round's step that is kept."""


@dataclass(frozen=True)
class FedAdam(Document):
    """[aggregation] of `fedadam`: Adam at the coordinator (Reddi et al. 2021, arXiv 2003.00295, Algorithm 2)."""

    server_learning_rate: Annotated[float, Between(0, 1000, above=True)] = 0.01
    """The step size."""
    beta_1: Annotated[float, Between(0, 1, below=True)] = 0.9
    """Decay of the first moment."""
    beta_2: Annotated[float, Between(0, 1, below=True)] = 0.99
    """Decay of the second moment."""
    tau: Annotated[float, Between(0, 1000, above=True)] = 1e-3
    """Added to the root of the second moment: how adaptive the steps are."""


@dataclass(frozen=True)
class TrimmedMean(Document):
    """[aggregation] of `trimmed-mean` (Yin et al. 2018, arXiv 1803.01498)."""

    cut: Annotated[float, Between(0, 0.5, above=True, below=True)] = 0.2
    """The share of the largest, and of the smallest, values of each coordinate that is left out."""


@dataclass(frozen=True)
class MultiKrum(Document):
    """[aggregation] of `multi-krum` (Blanchard et al. 2017, NeurIPS 30)."""

    malicious: Annotated[int, Whole(0, 10_000)] = 1
    """How many sites may be hostile."""
    select: Annotated[int, Whole(1, 10_000)] = 1
    """How many updates are averaged: those closest to their neighbours."""


AGGREGATORS: Mapping[str, type[Document]] = {
    "fedavg": NoParameters,
    "ffa": NoParameters,
    "fed-sb": NoParameters,
    "fedavgm": FedAvgM,
    "fedadam": FedAdam,
    "trimmed-mean": TrimmedMean,
    "median": NoParameters,
    "multi-krum": MultiKrum,
}
AGGREGATIONS = tuple(AGGREGATORS)
ROBUST = ("trimmed-mean", "median", "multi-krum")


def read_parameters(name: str, table: Any, where: str) -> Parameters:
    """The parameters of aggregator `name`, sorted, defaults filled in; ConfigError on anything else in the table."""
    return tuple(sorted(AGGREGATORS[name].from_dict(table, where=where).to_dict().items()))


def check_quorum(name: str, parameters: Parameters, quorum: int) -> None:
    """Refuse a robust rule that a round of `quorum` replies could not carry out.

    Raises:
        ConfigError: a trimmed mean that trims nobody, or Krum with fewer than `2 malicious + 3` replies (Blanchard et
            al. 2017, Proposition 4.2) or with more to select than are left of them.
    """
    values = dict(parameters)
    if name == "trimmed-mean" and int(values["cut"] * quorum) < 1:
        raise ConfigError(
            f"cut {values['cut']:g} trims nobody from a quorum of {quorum}",
            fix=f"write a cut of at least {1 / quorum:.3g}, or raise the quorum",
        )
    if name == "multi-krum":
        malicious, select = int(values["malicious"]), int(values["select"])
        needed = 2 * malicious + 3
        if quorum < needed:
            raise ConfigError(
                f"multi-krum against {malicious} malicious sites needs {needed} replies, the quorum is {quorum}",
                fix="raise the quorum, or lower malicious in [aggregation]",
            )
        if select > max(1, quorum - malicious - 2):
            raise ConfigError(
                f"multi-krum cannot select {select} of {quorum} replies with {malicious} malicious sites among them",
                fix=f"select at most {max(1, quorum - malicious - 2)}",
            )
