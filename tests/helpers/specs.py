"""The run specs and site.toml of the tests: one small valid document of each, in which a test changes what it is about.

A spec's fields are keywords (`run_spec(rounds=1, targets=["attention"])`), since their names are unique; `parameters`
is `[aggregation]`. Fields of site.toml come by section (`site_toml(policy={"max_rank": 4})`).
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypedDict, Unpack

from fl_shared.documents.spec import RunSpec

SITE = "hospital-001"
BASE = "sha256:" + "a" * 64
URL = "https://coordinator.example:9443"

Table = dict[str, dict[str, Any]]


class SpecFields(TypedDict, total=False):
    """What a test may say of a run spec; `RunSpec` knows what it means."""

    name: str
    base_model: str
    sites: Iterable[str]
    rounds: int
    quorum: int
    round_timeout_s: float
    aggregation: str
    wire: str
    parameters: Mapping[str, Any]
    kind: str
    labels: Iterable[str]
    max_tokens: int
    rank: int
    alpha: float
    targets: Iterable[str]
    noise_multiplier: float
    clipping_norm: float
    sampling_probability: float
    steps_per_round: int
    learning_rate: float
    head_learning_rate: float
    momentum: float
    seed_adapter: int


_SECTION = {
    **dict.fromkeys(
        ("name", "base_model", "sites", "rounds", "quorum", "round_timeout_s", "aggregation", "wire"), "run"
    ),
    **dict.fromkeys(("kind", "labels", "max_tokens"), "task"),
    **dict.fromkeys(("rank", "alpha", "targets"), "lora"),
}


def spec_table(**fields: Unpack[SpecFields]) -> Table:
    """A spec as a table that `RunSpec.from_dict` reads: each call makes another one, which the caller may change."""
    table: Table = {
        "run": {"name": "demo", "base_model": BASE, "sites": [SITE, "hospital-002"], "rounds": 3, "quorum": 1},
        "task": {"kind": "classification", "labels": ["A", "B"], "max_tokens": 8},
        "lora": {"rank": 2, "targets": ["attention"]},
        "training": {
            "noise_multiplier": 1.0,
            "clipping_norm": 1.0,
            "sampling_probability": 0.1,
            "steps_per_round": 4,
            "learning_rate": 0.1,
            "head_learning_rate": 1.0,
        },
    }
    for name, value in fields.items():
        if name == "parameters":
            table["aggregation"] = dict(fields["parameters"])
        else:
            plain = value if isinstance(value, str | int | float) or not isinstance(value, Iterable) else list(value)
            table[_SECTION.get(name, "training")][name] = plain
    return table


def run_spec(**fields: Unpack[SpecFields]) -> RunSpec:
    """A spec, read and checked."""
    return RunSpec.from_dict(spec_table(**fields))


def spec_toml(**fields: Unpack[SpecFields]) -> str:
    """A spec as an admin writes it."""
    return to_toml(spec_table(**fields))


def write_spec(path: Path, **fields: Unpack[SpecFields]) -> Path:
    """Write a spec into a file; its path."""
    path.write_text(spec_toml(**fields), encoding="utf-8")
    return path


def site_toml(site: str = SITE, url: str = URL, **sections: Mapping[str, Any]) -> str:
    """A site's configuration; `sections` change or add fields."""
    table: Table = {
        "site": {"id": site},
        "server": {"url": url},
        "data": {
            "name": "diagnoses",
            "path": "records.csv",
            "text_column": "text",
            "label_column": "label",
            "privacy_unit": "record",
        },
        "model": {"directory": "tiny", "device": "cpu"},
        "policy": {
            "min_noise_multiplier": 0.8,
            "max_clipping_norm": 1.0,
            "max_sampling_probability": 0.2,
            "max_steps_per_round": 20,
        },
        "budget": {"epsilon": 8.0, "delta": 1e-5, "approver": "privacy officer"},
    }
    for name, fields in sections.items():
        table[name] = {**table.get(name, {}), **fields}
    return to_toml(table)


def to_toml(table: Mapping[str, Mapping[str, Any]]) -> str:
    """The tables as TOML; of texts, numbers, truth values and lists, JSON is TOML, too."""
    return "\n".join(
        f"[{section}]\n" + "".join(f"{name} = {_value(value)}\n" for name, value in fields.items() if value is not None)
        for section, fields in table.items()
    )


def _value(value: Any) -> str:
    return json.dumps(str(value) if isinstance(value, Path) else value, ensure_ascii=False)
