"""A proposed run: a run spec, or noise, sampling and steps given one by one."""

from __future__ import annotations

import argparse
import dataclasses
from dataclasses import dataclass

from fl_shared.cli.verbs import path
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError
from fl_shared.ledger import LedgerReader
from fl_shared.privacy.mechanism import Mechanism


@dataclass(frozen=True)
class Proposal:
    """One round's mechanism, how many rounds, and where that came from."""

    mechanism: Mechanism
    rounds: int | None
    source: str

    def over(self, rounds: int) -> Mechanism:
        """The mechanism of `rounds` rounds together."""
        return dataclasses.replace(self.mechanism, steps=self.mechanism.steps * rounds)


def add_proposal(parser: argparse.ArgumentParser) -> None:
    """Add the options that describe a run."""
    parser.add_argument("--dataset", metavar="NAME", help="the data set (default: the only one)")
    parser.add_argument("--study", metavar="NAME", help="the study whose budget is asked, too")
    parser.add_argument("--spec", metavar="FILE", type=path, help="a run spec (TOML), as for fl-admin runs launch")
    parser.add_argument("--noise", metavar="SIGMA", type=float, help="noise multiplier, instead of the spec's")
    parser.add_argument("--sampling", metavar="Q", type=float, help="sampling probability, instead of the spec's")
    parser.add_argument("--steps", metavar="N", type=int, help="steps a round, instead of the spec's")
    parser.add_argument("--rounds", metavar="K", type=int, help="rounds, instead of the spec's")


def proposal_of(arguments: argparse.Namespace, ledger: LedgerReader, dataset: str) -> Proposal:
    """Return what the options describe; without a spec, the newest training round fills what was not given.

    Raises ConfigError when something is neither given nor found.
    """
    rounds = arguments.rounds
    base: Mechanism | None
    if arguments.spec is not None:
        spec = RunSpec.from_toml(arguments.spec)
        base, source = spec.mechanism(), str(arguments.spec)
        rounds = spec.run.rounds if rounds is None else rounds
    else:
        base, source = None, "the options"
        for spend in ledger.spends(dataset=dataset):
            if spend.reservation.purpose == "training":
                base, source = spend.reservation.mechanism, f"the newest round of run {spend.reservation.run}"
    options = {
        "noise_multiplier": arguments.noise,
        "sampling_probability": arguments.sampling,
        "steps": arguments.steps,
    }
    options = {name: value for name, value in options.items() if value is not None}
    if base is None:
        missing = [name for name in ("noise", "sampling", "steps") if getattr(arguments, name) is None]
        if missing:
            raise ConfigError(
                f"the ledger has no round of {dataset!r} to go by",
                fix=f"give --spec FILE, or --{' and --'.join(missing)}",
            )
        base = Mechanism(**options, clipping_norm=1.0)
    elif options:
        base = dataclasses.replace(base, **options)
        source = f"{source}, with {', '.join(sorted(options))} changed"
    for value, name in ((base.steps, "--steps"), (1 if rounds is None else rounds, "--rounds")):
        if value < 1:
            raise ConfigError(f"{name} {value} is not usable", fix="use a whole number from 1")
    return Proposal(base, rounds, source)


def dataset_name(arguments: argparse.Namespace, ledger: LedgerReader) -> str:
    """Return the data set that `--dataset` names, or the only one; ConfigError when there are several."""
    names = sorted({dataset.name for dataset in ledger.datasets()})
    if arguments.dataset is not None:
        if arguments.dataset not in names:
            raise ConfigError(
                f"data set {arguments.dataset!r} is not registered", fix=f"choose from {', '.join(names) or 'none'}"
            )
        return str(arguments.dataset)
    if len(names) != 1:
        raise ConfigError(f"the ledger has {len(names)} data sets", fix=f"give --dataset: {', '.join(names) or 'none'}")
    return names[0]
