"""Aggregators and wire encodings on the hospital data: accuracy and bytes, in one process and without Flower.

The sites' engine, the encoding and the coordinator's aggregation are the real ones; only the transport, the ledger and
the signatures are left out. Noise and sampling come from the operating system, so each repeat is another draw.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from fl_client.data.icd10 import hospital_split
from fl_client.data.units import UnitData
from fl_client.inference.predict import evaluate
from fl_client.model.load import LoadedModel, load_model
from fl_client.training.round import initial_adapter, train_round
from fl_server.aggregation import RoundAggregate
from fl_shared.adapters.safetensors import pack, unpack
from fl_shared.cli.entry import cli_main
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError

HERE = Path(__file__).resolve().parent
EPILOG = """examples:
  python scenarios/hospital/compare.py                         every variant once, shortened
  python scenarios/hospital/compare.py --full                  with the scenario's own steps, rounds and noise
  python scenarios/hospital/compare.py --repeats 3             three draws of noise for each
  python scenarios/hospital/compare.py --only fedavg --only ffa
  python scenarios/hospital/compare.py --report                the table of what was measured before
"""

Tensors = Mapping[str, NDArray[np.float32]]

# A seventh of the scenario's work: smaller samples, fewer rounds, less noise (epsilon 3.5, not 2.5, at delta 1e-5).
SHORT = {"rounds": 3}
SHORT_TRAINING = {"sampling_probability": 0.03, "noise_multiplier": 0.7}


@dataclass(frozen=True)
class Rule:
    """An aggregator with its parameters; `run` and `aggregation` are what differs from the scenario's spec.

    Attributes:
        hostile: whether the last site sends ten times its update, turned around.
    """

    run: Mapping[str, Any]
    aggregation: Mapping[str, float] = field(default_factory=dict)
    hostile: bool = False


@dataclass(frozen=True)
class Variant:
    """A run that is trained, and the rules that its last round's updates are given to once more.

    Such a pair has the same updates, so it differs by the rule alone and not by another draw of noise.

    Attributes:
        lora: what differs from the scenario's `[lora]`.
        sites: how many sites the training data is dealt out to.
        again: name to another rule for the last round. `EXACT` stands for the mean of the sites' models.
    """

    rule: Rule
    lora: Mapping[str, Any] = field(default_factory=dict)
    sites: int = 3
    again: Mapping[str, Rule] = field(default_factory=dict)


EXACT = Rule({"aggregation": "fedavg"})
CUT, KRUM = {"cut": 0.2}, {"malicious": 1, "select": 4}
VARIANTS: Mapping[str, Variant] = {
    "fedavg": Variant(
        Rule({"aggregation": "fedavg"}),
        again={
            "mean of the models": EXACT,
            "bfloat16": Rule({"aggregation": "fedavg", "wire": "bfloat16"}),
            "int8": Rule({"aggregation": "fedavg", "wire": "int8"}),
            "median": Rule({"aggregation": "median"}),
            "multi-krum": Rule({"aggregation": "multi-krum"}, {"malicious": 0, "select": 1}),
        },
    ),
    "ffa": Variant(Rule({"aggregation": "ffa"})),
    "fed-sb, rank 8": Variant(Rule({"aggregation": "fed-sb"})),
    "fed-sb, rank 32": Variant(Rule({"aggregation": "fed-sb"}), lora={"rank": 32, "alpha": 64}),
    "fedavgm": Variant(Rule({"aggregation": "fedavgm"}, {"server_momentum": 0.5})),
    "fedadam": Variant(Rule({"aggregation": "fedadam"}, {"server_learning_rate": 0.02})),
    "fedavg, 7 sites": Variant(
        Rule({"aggregation": "fedavg"}),
        sites=7,
        again={
            "trimmed-mean": Rule({"aggregation": "trimmed-mean"}, CUT),
            "median": Rule({"aggregation": "median"}),
            "multi-krum": Rule({"aggregation": "multi-krum"}, KRUM),
            "1 of 7 hostile": Rule({"aggregation": "fedavg"}, hostile=True),
            "trimmed-mean, 1 of 7 hostile": Rule({"aggregation": "trimmed-mean"}, CUT, hostile=True),
            "median, 1 of 7 hostile": Rule({"aggregation": "median"}, hostile=True),
            "multi-krum, 1 of 7 hostile": Rule({"aggregation": "multi-krum"}, KRUM, hostile=True),
        },
    ),
}


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repeats", type=int, default=1, help="draws of noise and sampling for each variant")
    parser.add_argument("--only", action="append", metavar="NAME", help="this variant; may be given again")
    parser.add_argument("--full", action="store_true", help="the scenario's own steps, rounds and noise")
    parser.add_argument("--rounds", type=int, help="rounds instead of these")
    parser.add_argument(
        "--out", type=Path, default=HERE / "results" / "aggregators.json", help="file that results are added to"
    )
    parser.add_argument("--report", action="store_true", help="only print what the file holds")
    parser.add_argument("--json", action="store_true", help="print the summary as JSON instead of a table")
    return parser.parse_args(argv)


def chosen(names: Sequence[str] | None) -> Sequence[str]:
    """The variants to run; a ConcordatError names one that does not exist."""
    for name in names or ():
        if name not in VARIANTS:
            raise ConfigError(f"there is no variant {name!r}", fix=f"choose from: {'; '.join(VARIANTS)}")
    return names or list(VARIANTS)


def spec_of(variant: Variant, rule: Rule, base_model: str, *, full: bool, rounds: int | None) -> RunSpec:
    """The scenario's spec with the variant's and the rule's changes."""
    table = tomllib.loads((HERE / "scenario.toml").read_text("utf-8").replace("@BASE_MODEL@", base_model))
    sites = [f"hospital-{number:03d}" for number in range(1, variant.sites + 1)]
    if not full:
        table["run"] |= SHORT
        table["training"] |= SHORT_TRAINING
    table["run"] |= {"sites": sites, "quorum": len(sites), **rule.run}
    table["lora"] |= dict(variant.lora)
    if rounds is not None:
        table["run"]["rounds"] = rounds
    return RunSpec.from_dict(table | {"aggregation": dict(rule.aggregation)})


def shares(rows: Sequence[tuple[str, str]], sites: int) -> list[UnitData]:
    """Deal the rows out; each record is a privacy unit."""
    made = []
    for index in range(sites):
        mine = rows[index::sites]
        texts, labels = zip(*mine, strict=True)
        made.append(UnitData(texts, labels, np.arange(len(mine)), len(mine), "0" * 64))
    return made


class Comparison:
    """The scenario's data and the base model, loaded once."""

    def __init__(self, *, full: bool, rounds: int | None) -> None:
        self.model = load_model("tiny", device="cpu")
        self.train, self.test = hospital_split()
        self._full, self._rounds = full, rounds

    def spec(self, variant: Variant, rule: Rule) -> RunSpec:
        """The spec of a variant under a rule."""
        return spec_of(variant, rule, self.model.digest, full=self._full, rounds=self._rounds)

    def accuracy(self, offset: Tensors, spec: RunSpec) -> float:
        """On the held-out terms."""
        texts, labels = zip(*self.test, strict=True)
        return round(evaluate(self.model, offset, texts, labels, spec).figures["accuracy"], 4)

    def run(self, name: str) -> Iterator[dict[str, Any]]:
        """Train one variant from the seeded start; its figures, then those of each other rule for its last round."""
        variant = VARIANTS[name]
        spec = self.spec(variant, variant.rule)
        data = shares(self.train, variant.sites)
        began = time.perf_counter()
        adapter, state = b"", b""
        for number in range(1, spec.run.rounds + 1):
            base, before = adapter, unpack(adapter)
            updates = [
                train_round(self.model, mine, spec, spec.mechanism(), before, round=number).update for mine in data
            ]
            adapter, state, sent = aggregated(spec, base, state, updates)
        exact = spec.run.aggregation not in ("fedavgm", "fedadam")
        yield {
            "variant": name,
            "accuracy": self.accuracy(unpack(adapter), spec),
            "bytes_up": sent,
            "bytes_down": len(adapter),
            "product_error": distance_of_products(self.model, spec, before, updates) if exact else None,
            "rounds": spec.run.rounds,
            "mechanism": spec.mechanism().to_dict(),
            "seconds": round(time.perf_counter() - began, 1),
        }
        for other, rule in variant.again.items():
            changed = self.spec(variant, rule)
            if rule is EXACT:
                offset, wide = mean_of_models(self.model, changed, before, updates)
                found, size = self.accuracy(offset, wide), 0
            else:
                given = list(updates)
                if rule.hostile:
                    given[-1] = {key: np.float32(-10.0) * value for key, value in given[-1].items()}
                moved, _, size = aggregated(changed, base, b"", given)
                found = self.accuracy(unpack(moved), changed)
            yield {"variant": f"{name}: {other}", "accuracy": found, "bytes_up": size, "bytes_down": len(adapter)}


def aggregated(spec: RunSpec, base: bytes, state: bytes, updates: Sequence[Tensors]) -> tuple[bytes, bytes, int]:
    """The next adapter and server state by the coordinator's own code, and the bytes that one site sent."""
    with tempfile.TemporaryDirectory() as scratch:
        collected = RoundAggregate(spec, base, state, Path(scratch))
        for update in updates:
            sent = pack(update, wire=spec.run.wire)
            collected.add(unpack(sent, wire=spec.run.wire))
        return *collected.finish(), len(sent)


def mean_of_models(
    model: LoadedModel, spec: RunSpec, before: Tensors, updates: Sequence[Tensors]
) -> tuple[Tensors, RunSpec]:
    """The mean of the sites' models exactly, as an offset: their factors side by side, with the rank times the sites.

    `mean_i(B_i A_i) = [B_1 ... B_n] / n [A_1; ...; A_n]`, which no adapter of the run's own rank can hold.
    """
    sites = len(updates)
    lora = dataclasses.replace(spec.lora, rank=spec.lora.rank * sites, alpha=spec.lora.alpha * sites)
    wide = dataclasses.replace(spec, lora=lora)
    start = initial_adapter(model, spec)
    values: dict[str, NDArray[np.float32]] = {}
    for name, value in start.items():
        each = [value + before.get(name, np.float32(0)) + update[name] for update in updates]
        if ".lora_A" in name:
            values[name] = np.concatenate(each, axis=-2)
        elif ".lora_B" in name:
            values[name] = (np.concatenate(each, axis=-1) / sites).astype(np.float32)
        else:
            values[name] = np.mean(each, axis=0, dtype=np.float32)
    begin = initial_adapter(model, wide)
    return {name: value - begin[name] for name, value in values.items()}, wide


def distance_of_products(model: LoadedModel, spec: RunSpec, before: Tensors, updates: Sequence[Tensors]) -> float:
    """How far the product of the mean factors is from the mean of the sites' products, relative to how far that moved.

    Zero means that averaging tensors averaged the sites' models.
    """
    start = initial_adapter(model, spec)
    base = {name: value + before[name] if name in before else value for name, value in start.items()}

    def product(update: Tensors, name: str) -> NDArray[np.float64]:
        def factor(kind: str) -> NDArray[np.float64]:
            key = name.replace(".lora_A", kind)
            value = base[key].astype(np.float64)
            return value + update[key] if key in update else value

        up = factor(".lora_B")
        if name.replace(".lora_A", ".lora_R") in base:
            up = up @ factor(".lora_R")
        return up @ factor(".lora_A")

    mean = {name: np.mean([each[name] for each in updates], axis=0) for name in updates[0]}
    wrong = moved = 0.0
    for name in base:
        if ".lora_A" in name:
            exact = np.mean([product(each, name) for each in updates], axis=0)
            wrong += float(np.square(product(mean, name) - exact).sum())
            moved += float(np.square(exact - product({}, name)).sum())
    return float(np.sqrt(wrong / moved)) if moved else 0.0


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each name: accuracy over draws, bytes, and for a paired rule the difference."""
    found = []
    for name in dict.fromkeys(row["variant"] for row in rows):
        mine = [row for row in rows if row["variant"] == name]
        accuracy = [row["accuracy"] for row in mine]
        row = {
            "variant": name,
            "draws": len(mine),
            "accuracy": round(statistics.mean(accuracy), 4),
            "lowest": min(accuracy),
            "highest": max(accuracy),
            "bytes_up": mine[-1]["bytes_up"],
            "bytes_down": mine[-1]["bytes_down"],
        }
        if ": " in name:
            trained = {each["draw"]: each["accuracy"] for each in rows if each["variant"] == name.split(": ")[0]}
            apart = [each["accuracy"] - trained[each["draw"]] for each in mine]
            row["difference"] = round(statistics.mean(apart), 4)
        elif mine[-1]["product_error"] is not None:
            row["product_error"] = round(statistics.mean(each["product_error"] for each in mine), 4)
        found.append(row)
    return found


def show(console: Console, rows: Sequence[Mapping[str, Any]]) -> None:
    table = Table(title="Held-out accuracy, and bytes of one site in one round", title_justify="left")
    for column in ("aggregator", "draws", "accuracy", "from", "to", "paired", "bytes up", "bytes down", "A@B off"):
        table.add_column(column, justify="left" if column == "aggregator" else "right", no_wrap=True)
    for row in rows:
        table.add_row(
            row["variant"], str(row["draws"]),
            *(f"{row[key]:.3f}" for key in ("accuracy", "lowest", "highest")),
            f"{row['difference']:+.3f}" if "difference" in row else "",
            *(f"{row[key]:,}" if row[key] else "" for key in ("bytes_up", "bytes_down")),
            f"{row['product_error']:.1%}" if "product_error" in row else "",
        )  # fmt: skip
    console.print(table)


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(stderr=options.json)
    rows: list[dict[str, Any]] = json.loads(options.out.read_text("utf-8"))["runs"] if options.out.exists() else []
    names = chosen(options.only)
    if not options.report:
        torch.set_num_threads(1)
        compared = Comparison(full=options.full, rounds=options.rounds)
        first = max((row["draw"] for row in rows), default=0) + 1
        for draw in range(first, first + options.repeats):
            for name in names:
                for found in compared.run(name):
                    rows.append({"draw": draw} | found)
                    console.print(f"draw {draw}: {found['variant']}: {found['accuracy']:.3f}")
                options.out.parent.mkdir(parents=True, exist_ok=True)
                text = json.dumps({"summary": summary(rows), "runs": rows}, indent=1)
                options.out.write_text(text + "\n", encoding="utf-8")
    if options.json:
        print(json.dumps(summary(rows), indent=2))
    else:
        show(console, summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(cli_main(main, package="fl_client"))
