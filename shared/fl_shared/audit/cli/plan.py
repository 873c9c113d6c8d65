"""`fl-audit plan`: what a run would cost, and whether every budget would grant it, before it is launched.

Exit code 0 when all of its rounds would be granted, 11 when not. The ledger is only read.
"""

from __future__ import annotations

import argparse
from typing import Any

from fl_shared.audit.proposal import Proposal, add_proposal, dataset_name, proposal_of
from fl_shared.audit.source import add_source, open_ledger
from fl_shared.cli.output import print_csv, print_json
from fl_shared.cli.verbs import add_format
from fl_shared.errors import ConfigError
from fl_shared.ledger.standing import Standing, standings
from fl_shared.privacy.accounting.pld import pld_epsilon, steps_epsilon
from fl_shared.privacy.accounting.renyi import curve_epsilon, rdp_epsilon

EXAMPLES = """
fl-audit plan --site hospital-001 --spec next.toml
fl-audit plan --site hospital-001 --noise 1.2 --sampling 0.01 --steps 50 --rounds 10
"""
REFUSED = 11


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    add_proposal(parser)
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the plan; exit code 11 when a budget would refuse."""
    with open_ledger(arguments) as ledger:
        name = dataset_name(arguments, ledger)
        proposal = proposal_of(arguments, ledger, name)
        if proposal.rounds is None:
            raise ConfigError("a plan needs a number of rounds", fix="give --spec FILE or --rounds K")
        rows = [_row(one, proposal, proposal.rounds) for one in standings(ledger, name, arguments.study)]
    granted = all(row["granted"] for row in rows)
    if arguments.json:
        print_json(
            {
                "site": arguments.site,
                "dataset": name,
                "mechanism": proposal.mechanism.to_dict(),
                "rounds": proposal.rounds,
                "source": proposal.source,
                "granted": granted,
                "budgets": rows,
            }
        )
    elif arguments.csv:
        print_csv(rows)
    else:
        print(
            f"{proposal.rounds} rounds of {proposal.mechanism.steps} steps on {name}, noise "
            f"{proposal.mechanism.noise_multiplier:g}, sampling {proposal.mechanism.sampling_probability:g} "
            f"({proposal.source})"
        )
        for row in rows:
            print(_words(row))
        print("GRANTED" if granted else "REFUSED")
    return 0 if granted else REFUSED


def _row(one: Standing, proposal: Proposal, rounds: int) -> dict[str, Any]:
    whole, delta = proposal.over(rounds), one.budget.delta
    after = one.after(whole)
    fits = min(rounds, one.rounds_that_fit(proposal.mechanism))
    return {
        "budget": one.name,
        "epsilon": one.budget.epsilon,
        "delta": delta,
        "granted": one.gate.admits(after),
        "rounds_granted": fits,
        "noise_that_fits": one.noise_for(whole.sampling_probability, whole.steps) if fits < rounds else None,
        "before": curve_epsilon(one.charged, delta),
        "after": curve_epsilon(after, delta),
        "after_pld": steps_epsilon(after, delta),
        "used_before": one.gate.used(one.charged),
        "used_after": one.gate.used(after),
        "alone": rdp_epsilon([whole], delta),
        "alone_pld": pld_epsilon([whole], delta),
    }


def _words(row: dict[str, Any]) -> str:
    said = (
        f"{row['budget']}: epsilon {row['before']:.3f} -> {row['after']:.3f} of {row['epsilon']:g} at delta "
        f"{row['delta']:g} (PLD {row['after_pld']:.3f}); gate {row['used_before']:.0%} -> {row['used_after']:.0%}; "
        f"the run alone {row['alone']:.3f} (PLD {row['alone_pld']:.3f})"
    )
    if row["granted"]:
        return said
    noise = row["noise_that_fits"]
    other = f"noise {noise:.3f} would fit all" if noise is not None else "no noise would fit all"
    return f"{said}\n  refused: {row['rounds_granted']} rounds would be granted; {other}"
