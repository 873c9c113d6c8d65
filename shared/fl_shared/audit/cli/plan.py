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
        rows = [_row(standing, proposal, proposal.rounds) for standing in standings(ledger, name, arguments.study)]
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


def _row(standing: Standing, proposal: Proposal, rounds: int) -> dict[str, Any]:
    mechanism, delta = proposal.over(rounds), standing.budget.delta
    after = standing.after(mechanism)
    fits = min(rounds, standing.rounds_that_fit(proposal.mechanism))
    return {
        "budget": standing.name,
        "epsilon": standing.budget.epsilon,
        "delta": delta,
        "granted": standing.gate.admits(after),
        "rounds_granted": fits,
        "noise_that_fits": standing.noise_for(mechanism.sampling_probability, mechanism.steps)
        if fits < rounds
        else None,
        "before": curve_epsilon(standing.charged, delta),
        "after": curve_epsilon(after, delta),
        "after_pld": steps_epsilon(after, delta),
        "used_before": standing.gate.used(standing.charged),
        "used_after": standing.gate.used(after),
        "alone": rdp_epsilon([mechanism], delta),
        "alone_pld": pld_epsilon([mechanism], delta),
    }


def _words(row: dict[str, Any]) -> str:
    text = (
        f"{row['budget']}: epsilon {row['before']:.3f} -> {row['after']:.3f} of {row['epsilon']:g} at delta "
        f"{row['delta']:g} (PLD {row['after_pld']:.3f}); gate {row['used_before']:.0%} -> {row['used_after']:.0%}; "
        f"the run alone {row['alone']:.3f} (PLD {row['alone_pld']:.3f})"
    )
    if row["granted"]:
        return text
    noise = row["noise_that_fits"]
    other = f"noise {noise:.3f} would fit all" if noise is not None else "no noise would fit all"
    return f"{text}\n  refused: {row['rounds_granted']} rounds would be granted; {other}"
