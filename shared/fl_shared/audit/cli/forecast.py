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
        found = standings(ledger, name, arguments.study)
        proposal = proposal_of(arguments, ledger, name)
        left = {one.name: one.rounds_that_fit(proposal.mechanism) for one in found}
        tightest = min(found, key=lambda one: left[one.name])
        past = history(ledger, tightest.budget)
    rows = [_row(one, left[one.name], proposal) for one in found]
    rounds = left[tightest.name]
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


def _row(one: Standing, left: int, proposal: Proposal) -> dict[str, Any]:
    asked, rounds = proposal.mechanism, proposal.rounds
    fits = None if rounds is None else one.noise_for(asked.sampling_probability, asked.steps * rounds)
    return {
        "budget": one.name,
        "epsilon": one.budget.epsilon,
        "delta": one.budget.delta,
        "spent": curve_epsilon(one.charged, one.budget.delta),
        "used": one.gate.used(one.charged),
        "rounds_left": left,
        "noise_that_fits": fits,
    }


def _ahead(one: Standing, over: Any, rounds: int) -> list[tuple[int, float]]:
    """Return (further rounds, epsilon then), at most MOST_AHEAD points."""
    step = max(1, -(-rounds // MOST_AHEAD))
    numbers = sorted({*range(0, rounds + 1, step), rounds})
    return [(n, curve_epsilon(one.after(over(n)) if n else one.charged, one.budget.delta)) for n in numbers]


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
            said = f"noise {fits:.3f} fits" if fits is not None else "no noise fits"
            print(f"  {said} {document['rounds_asked']} rounds more")
    print()
    for line in chart.lines(tightest.budget.epsilon, past, ahead):
        print(line)
