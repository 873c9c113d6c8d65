"""`[run] aggregation` and `[aggregation]`: names, parameters, and what a robust rule needs of the quorum."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from fl_shared.documents.aggregators import AGGREGATIONS, AGGREGATORS
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError
from helpers.specs import run_spec

SITES = [f"hospital-{number:03d}" for number in range(1, 8)]


def read(name: str, quorum: int = 7, **parameters: Any) -> RunSpec:
    return run_spec(sites=SITES, quorum=quorum, aggregation=name, parameters=parameters)


@pytest.mark.parametrize("name", AGGREGATIONS)
def test_every_name_has_defaults_for_all_its_parameters(name: str) -> None:
    """An aggregator alone makes a spec; its parameters are filled in, travel, and are under the digest."""
    spec = read(name)
    parameters = dataclasses.fields(AGGREGATORS[name])
    assert set(dict(spec.aggregation)) == {each.name for each in parameters}
    assert RunSpec.from_dict(spec.to_dict()) == spec
    for each in parameters:
        default: Any = each.default
        another: dict[str, Any] = {each.name: default + 1 if isinstance(default, int) else default * 0.9}
        other = read(name, **another)
        assert other.digest != spec.digest


def test_an_unknown_name_is_refused_with_the_list() -> None:
    """A misspelt aggregator: the message has the nearest name, the fix has all of them."""
    with pytest.raises(ConfigError, match="did you mean 'fedadam'") as caught:
        read("fedadm")
    assert all(name in caught.value.fix for name in AGGREGATIONS)


@pytest.mark.parametrize(
    ("name", "parameters", "message"),
    [
        ("fedavg", {"server_momentum": 0.9}, "server_momentum is not a field here"),
        ("fedavgm", {"server_momentum": 1.0}, "server_momentum is 1.0"),
        ("fedavgm", {"server_learning_rate": 0}, "server_learning_rate is 0"),
        ("fedavgm", {"momentum": 0.9}, "momentum is not a field here"),
        ("fedadam", {"beta_1": -0.1}, "beta_1 is -0.1"),
        ("fedadam", {"beta_2": 1}, "beta_2 is 1"),
        ("fedadam", {"tau": 0}, "tau is 0"),
        ("fedadam", {"tau": "small"}, "tau is 'small'"),
        ("trimmed-mean", {"cut": 0.5}, "cut is 0.5"),
        ("trimmed-mean", {"cut": 0.1}, "cut 0.1 trims nobody from a quorum of 7"),
        ("median", {"cut": 0.2}, "cut is not a field here"),
        ("multi-krum", {"malicious": 0.5}, "malicious is 0.5"),
        ("multi-krum", {"malicious": 3}, "needs 9 replies, the quorum is 7"),
        ("multi-krum", {"malicious": 2, "select": 4}, "cannot select 4 of 7 replies"),
        ("multi-krum", {"select": 0}, "select is 0"),
    ],
)
def test_a_wrong_parameter_is_named(name: str, parameters: dict[str, Any], message: str) -> None:
    """A parameter of another aggregator, out of bounds, or impossible with the quorum is refused with a fix."""
    with pytest.raises(ConfigError, match=r"\[aggregation\]: .*" + message) as caught:
        read(name, **parameters)
    assert caught.value.fix


def test_a_robust_rule_needs_its_replies() -> None:
    """The same parameters pass with a large quorum and not with a small one."""
    read("multi-krum", quorum=5)
    with pytest.raises(ConfigError, match="needs 5 replies, the quorum is 4"):
        read("multi-krum", quorum=4)
    read("trimmed-mean", quorum=5)
    with pytest.raises(ConfigError, match="trims nobody from a quorum of 4"):
        read("trimmed-mean", quorum=4)
