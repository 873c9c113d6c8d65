"""`fl-audit forecast`: how long the budget lasts, and how it was used up so far.

How many rounds of a spec are left, which noise multiplier fits a number of further rounds, and the burn-down curve
in the terminal and, with --out, as PNG or SVG.
"""

from __future__ import annotations

import argparse
from typing import Any

from fl_shared.audit.proposal import Proposal, add_proposal, dataset_name, proposal_of
from fl_shared.audit.report import chart
from fl_shared.audit.report.history import Point, history
from fl_shared.audit.source import add_source, open_ledger
from fl_shared.cli.extras import require
from fl_shared.cli.output import print_csv, print_json
from fl_shared.cli.verbs import add_format, path
from fl_shared.ledger.standing import Standing, standings
from fl_shared.privacy.accounting.renyi import curve_epsilon

EXAMPLES = """
fl-audit forecast --site hospital-001
fl-audit forecast --site hospital-001 --rounds 20 --out burn-down.svg
fl-audit forecast --site hospital-001 --spec next.toml --json
"""
MOST_AHEAD = 60


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    add_proposal(parser)
    parser.add_argument("--out", metavar="FILE", type=path, help="draw the curve: a name that ends in .png or .svg")
    add_format(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print the forecast."""
    if arguments.out is not None:
        require("report")
    with open_ledger(arguments) as ledger:
        name = dataset_name(arguments, ledger)
        budgets = standings(ledger, name, arguments.study)
        proposal = proposal_of(arguments, ledger, name)
        rounds_left = {standing.name: standing.rounds_that_fit(proposal.mechanism) for standing in budgets}
        tightest = min(budgets, key=lambda standing: rounds_left[standing.name])
        past = history(ledger, tightest.budget)
    rows = [_row(standing, rounds_left[standing.name], proposal) for standing in budgets]
    rounds = rounds_left[tightest.name]
    ahead = _ahead(tightest, proposal.over, rounds)
    if arguments.out is not None:
        title = f"{arguments.site}: {tightest.name} (delta {tightest.budget.delta:g})"
        chart.draw(arguments.out, title, tightest.budget.epsilon, past, ahead)
    document = {
        "site": arguments.site,
        "dataset": name,
        "study": arguments.study,
        "mechanism": proposal.mechanism.to_dict(),
        "source": proposal.source,
        "rounds_left": rounds,
        "rounds_asked": proposal.rounds,
        "budgets": rows,
        "past": [point.to_dict() for point in past],
        "ahead": [{"round": number, "epsilon": epsilon} for number, epsilon in ahead],
    }
    if arguments.json:
        print_json(document)
    elif arguments.csv:
        print_csv(rows)
    else:
        _print(document, tightest, past, ahead)
        if arguments.out is not None:
            print(f"drawn        {arguments.out}")
    return 0


def _row(standing: Standing, rounds_left: int, proposal: Proposal) -> dict[str, Any]:
    mechanism, rounds = proposal.mechanism, proposal.rounds
    fits = None if rounds is None else standing.noise_for(mechanism.sampling_probability, mechanism.steps * rounds)
    return {
        "budget": standing.name,
        "epsilon": standing.budget.epsilon,
        "delta": standing.budget.delta,
        "spent": curve_epsilon(standing.charged, standing.budget.delta),
        "used": standing.gate.used(standing.charged),
        "rounds_left": rounds_left,
        "noise_that_fits": fits,
    }


def _ahead(standing: Standing, over: Any, rounds: int) -> list[tuple[int, float]]:
    """Return (further rounds, epsilon then), at most MOST_AHEAD points."""
    step = max(1, -(-rounds // MOST_AHEAD))
    numbers = sorted({*range(0, rounds + 1, step), rounds})
    return [
        (n, curve_epsilon(standing.after(over(n)) if n else standing.charged, standing.budget.delta)) for n in numbers
    ]


def _print(document: dict[str, Any], tightest: Standing, past: list[Point], ahead: list[tuple[int, float]]) -> None:
    mechanism = document["mechanism"]
    print(
        f"{document['site']}, data set {document['dataset']}: rounds of {mechanism['steps']} steps, noise "
        f"{mechanism['noise_multiplier']:g}, sampling {mechanism['sampling_probability']:g} ({document['source']})"
    )
    for row in document["budgets"]:
        print(
            f"{row['budget']}: {row['rounds_left']} rounds left (epsilon {row['spent']:.3f} of {row['epsilon']:g} at "
            f"delta {row['delta']:g}; gate {row['used']:.0%})"
        )
        if document["rounds_asked"] is not None:
            fits = row["noise_that_fits"]
            fitting = f"noise {fits:.3f} fits" if fits is not None else "no noise fits"
            print(f"  {fitting} {document['rounds_asked']} rounds more")
    print()
    for line in chart.lines(tightest.budget.epsilon, past, ahead):
        print(line)
