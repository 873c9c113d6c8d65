"""The aggregators that a run may name, the parameters of each, and what each needs of the quorum.

The names stand in `[run] aggregation`, the parameters in `[aggregation]`. Both sides read them: the coordinator
averages by them, and a site learns from the name which tensors it trains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fl_shared.errors import ConfigError
from fl_shared.fields import Fields

Parameters = tuple[tuple[str, float], ...]


@dataclass(frozen=True, slots=True)
class Parameter:
    """One number in `[aggregation]`, with its bounds; `above`/`below` exclude the ends, `whole` wants an integer."""

    name: str
    default: float
    low: float
    high: float
    above: bool = False
    below: bool = False
    whole: bool = False

    def read(self, fields: Fields) -> float:
        """The value given, or the default; ConfigError naming the field otherwise."""
        if self.whole:
            return fields.integer(self.name, low=int(self.low), high=int(self.high), default=int(self.default))
        return fields.number(
            self.name, low=self.low, high=self.high, above=self.above, below=self.below, default=self.default
        )


_SERVER_RATE = Parameter("server_learning_rate", 1.0, 0.0, 1000.0, above=True)
AGGREGATORS: Mapping[str, tuple[Parameter, ...]] = {
    "fedavg": (),
    "ffa": (),
    "fed-sb": (),
    "fedavgm": (_SERVER_RATE, Parameter("server_momentum", 0.9, 0.0, 1.0, below=True)),
    "fedadam": (
        Parameter("server_learning_rate", 0.01, 0.0, 1000.0, above=True),
        Parameter("beta_1", 0.9, 0.0, 1.0, below=True),
        Parameter("beta_2", 0.99, 0.0, 1.0, below=True),
        Parameter("tau", 1e-3, 0.0, 1000.0, above=True),
    ),
    "trimmed-mean": (Parameter("cut", 0.2, 0.0, 0.5, above=True, below=True),),
    "median": (),
    "multi-krum": (
        Parameter("malicious", 1, 0, 10_000, whole=True),
        Parameter("select", 1, 1, 10_000, whole=True),
    ),
}
AGGREGATIONS = tuple(AGGREGATORS)
ROBUST = ("trimmed-mean", "median", "multi-krum")


def read_parameters(name: str, fields: Fields) -> Parameters:
    """The parameters of aggregator `name`, sorted, defaults filled in; ConfigError on anything else in the table."""
    found = sorted((each.name, each.read(fields)) for each in AGGREGATORS[name])
    fields.done()
    return tuple(found)


def check_quorum(name: str, parameters: Parameters, quorum: int) -> None:
    """Refuse a robust rule that a round of `quorum` replies could not carry out.

    Raises:
        ConfigError: a trimmed mean that trims nobody, or Krum with fewer than `2 malicious + 3` replies (Blanchard et
            al. 2017, Proposition 4.2) or with more to select than are left of them.
    """
    given = dict(parameters)
    if name == "trimmed-mean" and int(given["cut"] * quorum) < 1:
        raise ConfigError(
            f"cut {given['cut']:g} trims nobody from a quorum of {quorum}",
            fix=f"write a cut of at least {1 / quorum:.3g}, or raise the quorum",
        )
    if name == "multi-krum":
        malicious, select = int(given["malicious"]), int(given["select"])
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
