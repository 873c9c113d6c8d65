"""The statement as a page: sections of text, tables and figures, from which HTML and PDF are both made."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from fl_shared.audit.report import chart, words
from fl_shared.audit.report.history import Point
from fl_shared.audit.report.stated import NOT_STATED
from fl_shared.errors import printable


@dataclass(frozen=True)
class Table:
    """Column heads and rows of text; `widths` are relative."""

    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    widths: Sequence[float] = ()


@dataclass(frozen=True)
class Figure:
    """A drawing as SVG text and PNG bytes, and its description."""

    alt: str
    svg: str
    png: bytes


@dataclass(frozen=True)
class Lines:
    """Room for persons to sign by hand: for each a line for name, function, date and signature."""

    signers: Sequence[str]


@dataclass(frozen=True)
class Section:
    """A heading and what follows it; a str is a paragraph."""

    title: str
    blocks: list[str | Table | Figure | Lines] = field(default_factory=list)


def figure_of(drawn: Any, alt: str) -> Figure:
    """Return a matplotlib figure in both forms."""
    svg, png = io.StringIO(), io.BytesIO()
    drawn.savefig(svg, format="svg", metadata={"Date": None})
    drawn.savefig(png, format="png", dpi=150)
    text = svg.getvalue()
    return Figure(alt, text[text.index("<svg") :], png.getvalue())


def title(body: dict[str, Any]) -> str:
    """Return the heading of the first page."""
    return "Privacy statement" + (f" on run {body['run']}" if body["run"] else "")


def running_head(body: dict[str, Any]) -> tuple[str, str]:
    """Return the head of every page, left and right: whose statement, and which."""
    return f"Privacy statement of {body['site']}", f"Statement {body['id']}"


def sections(body: dict[str, Any]) -> Iterator[Section]:
    """Yield the page of a statement's body, in the order that a reader needs it."""
    yield _about(body)
    yield _summary(body)
    yield _meaning(body)
    yield from _budgets(body)
    guarantee = body["guarantee"]
    yield Section(
        "Guarantee",
        [
            guarantee["definition"],
            f"Neighbouring data sets: {guarantee['neighbouring']}.",
            f"Trust model. {guarantee['trust_model']}",
            f"Composition. {guarantee['composition']}",
        ],
    )
    yield Section("Outside the guarantee", [f"• {text}" for text in body["outside"]])
    yield Section("What this statement does not claim", [f"• {text}" for text in body["not_claimed"]])
    yield _empirical(body)
    yield Section("Signatures", [words.SIGN, Lines(words.SIGNERS)])
    yield _runs(body)
    yield from _curves(body)
    yield _mechanisms(body)
    yield Section("Randomness", [body["randomness"]])
    yield _failures(body)
    rows = [(accountant["name"], accountant["library"], accountant["source"]) for accountant in body["accountants"]]
    yield Section("Accountants and versions", [Table(("accountant", "library", "source"), rows, (3, 2, 3))])
    yield Section("What NIST SP 800-226 asks for, and where it stands", [Table(("asked", "section"), words.NIST)])
    crosswalk = [tuple(str(row[name]) for name in row) for row in body["crosswalk"]]
    yield Section(
        "Crosswalk to the law",
        [
            "What this record contributes to each provision, and what it cannot do for the site. No legal advice.",
            Table(("provision", "asks", "served here by", "stays with the site"), crosswalk, (2, 3, 3, 3)),
        ],
    )
    yield _digests(body)
    yield _ledger(body)


def _about(body: dict[str, Any]) -> Section:
    stated = body["stated"]
    approvals = [
        f"{dataset['name']}{', study ' + budget['study'] if budget['study'] else ''}: {budget['approver']}, "
        f"entered in the ledger on {budget['entered_at'][:10]} (entry {budget['entry']})"
        for dataset in body["datasets"]
        for budget in dataset["budgets"]
    ]
    rows = [
        ("Institution", stated["institution"] or NOT_STATED),
        ("Site", body["site"]),
        ("Statement", body["id"]),
        ("Made", f"{body['made_at'][:19].replace('T', ' ')} UTC, from {body['ledger']['entries']} ledger entries"),
        (
            "Covers",
            f"run {body['run']}; cumulative figures cover everything" if body["run"] else "everything in the ledger",
        ),
        ("Purpose", stated["purpose"] or NOT_STATED),
        ("Partners", "; ".join(stated["partners"] or ()) or NOT_STATED),
        ("Approved by", "\n".join(approvals) or "nobody: the ledger has no budget"),
        ("Approved on", stated["approved_on"] or f"{NOT_STATED}; see the ledger's dates above"),
        ("Contact", stated["contact"] or NOT_STATED),
    ]
    note = (
        "Institution, purpose, partners, date of approval and contact are the site's word; "
        "all else is read from its ledger."
    )
    return Section("", [Table(("", ""), rows, (1, 4.6)), note])


def _summary(body: dict[str, Any]) -> Section:
    section = Section("In short")
    for dataset in body["datasets"]:
        if not dataset["private"]:
            section.blocks.append(f"Data set {dataset['name']}. {words.PUBLIC}")
            continue
        for budget in dataset["budgets"]:
            study = f", study {budget['study']}" if budget["study"] else ""
            section.blocks.append(
                f"Data set {dataset['name']}{study}: everything that was and will be released under its budget is "
                f"(epsilon {budget['epsilon']:g}, delta {budget['delta']:g})-differentially private for each "
                f"{dataset['privacy_unit']} of {dataset['units']}, however later runs are chosen in the light of "
                f"earlier results. This ceiling (version {budget['version']}) was approved by {budget['approver']}."
            )
            section.blocks.append(
                f"Charged to it so far: epsilon {budget['spent']:.4g} at the same delta, {budget['spent_pld']:.4g} by "
                "privacy loss distributions. These two hold as guarantees of their own where the runs so far would "
                "have been the same whatever the earlier results."
            )
    if not body["datasets"]:
        section.blocks.append("The ledger has no data set.")
    return section


def _meaning(body: dict[str, Any]) -> Section:
    section = Section("What epsilon means")
    private = [dataset for dataset in body["datasets"] if dataset["private"] and dataset["budgets"]]
    if not private:
        section.blocks.append("No private data set has a budget, so there is no epsilon to speak of.")
        return section
    for unit in sorted({dataset["privacy_unit"] for dataset in private}):
        section.blocks.extend(text.format(unit=unit) for text in words.MEANING)
    for dataset in private:
        budget = dataset["budgets"][0]
        factor = f"{math.exp(budget['epsilon']):,.0f}" if budget["epsilon"] < 30 else f"e^{budget['epsilon']:g}"
        example = words.EXAMPLE.format(
            unit=dataset["privacy_unit"],
            ceiling=_percent(budget["best_guess_at_ceiling"]),
            so_far=_percent(budget["best_guess_so_far"]),
            epsilon=budget["epsilon"],
            spent=budget["spent"],
            factor=factor,
        )
        section.blocks.append(f"{dataset['name']}. {example}" if len(private) > 1 else example)
    return section


def _percent(share: float) -> str:
    """Return a bound in percent, rounded up, so that it stays a bound."""
    return f"{min(100.0, math.ceil(share * 1e4) / 100):.2f} %"


def _budgets(body: dict[str, Any]) -> Iterator[Section]:
    """Yield each data set with its budgets, what the percentages mean, and how each budget was used up."""
    section = Section("Data sets and budgets")
    for dataset in body["datasets"]:
        bound = f"at most {dataset['bound_per_unit']} records of each are used"
        section.blocks.append(
            f"{dataset['name']}, version {dataset['version']}: {dataset['units']} units; the unit is one "
            f"{dataset['privacy_unit']}, {bound}. Overlaps: {', '.join(dataset['overlaps']) or 'none declared'}. "
            f"Fingerprint (keyed): {dataset['fingerprint']}"
        )
        section.blocks.append(
            Table(
                ("budget", "ceiling", "charged", "of ceiling", "by PLD", "held", "gate", "delta", "delta x units"),
                [
                    (
                        budget["study"] or "overall",
                        f"{budget['epsilon']:g}",
                        f"{budget['spent']:.4f}",
                        f"{budget['spent'] / budget['epsilon']:.0%}",
                        f"{budget['spent_pld']:.4f}",
                        f"{budget['reserved']:.4f}",
                        f"{budget['gate_used']:.0%}",
                        f"{budget['delta']:g}",
                        f"{budget['delta_times_units']:.3g}",
                    )
                    for budget in dataset["budgets"]
                ],
                (1.8, 1.2, 1.4, 1.5, 1.4, 1.3, 1.1, 1.3, 1.8),
            )
        )
    yield section
    for dataset in body["datasets"]:
        for budget in dataset["budgets"]:
            study = f"study {budget['study']}" if budget["study"] else "overall"
            name = f"{dataset['name']}, {study}"
            yield _burn_down(name, budget)


def _burn_down(name: str, budget: dict[str, Any]) -> Section:
    section = Section(f"How the budget was used: {name}")
    if not budget["burn_down"]:
        section.blocks.append("Nothing has been charged to it yet: epsilon 0, and the gate at 0 %.")
        return section
    section.blocks.append(
        words.TWO_SHARES.format(
            share=f"{budget['spent'] / budget['epsilon']:.0%}",
            gate=f"{budget['gate_used']:.0%}",
            held=f"epsilon {budget['reserved']:.4g}" if budget["reserved"] else "nothing",
            pld=f"{budget['spent_pld']:.4g}",
        )
    )
    past = [Point(**point) for point in budget["burn_down"]]
    drawn = chart.burn_down(f"{name}: ceiling epsilon {budget['epsilon']:g}", budget["epsilon"], past)
    section.blocks.append(figure_of(drawn, f"epsilon and the gate after each charge to {name}; open rounds included"))
    return section


def _runs(body: dict[str, Any]) -> Section:
    rows = [
        (
            row["run"],
            row["dataset"],
            str(row["rounds"]),
            f"{row['epsilon']:.4f}",
            f"{row['epsilon_pld']:.4f}",
            f"{row['delta']:g}",
            f"{row['cumulative']:.4f}",
            row["last"][:16].replace("T", " "),
        )
        for row in body["runs"]
    ]
    head = ("run", "data set", "rounds", "epsilon", "by PLD", "delta", "in all then", "last charge")
    return Section(
        "Runs",
        [
            "Epsilon of each run by itself, and of everything charged to its data set when it ended.",
            Table(head, rows, (4, 2.6, 1.2, 1.3, 1.3, 1.2, 1.6, 2.5)),
        ],
    )


def _curves(body: dict[str, Any]) -> Iterator[Section]:
    for curve in body["curves"]:
        title = f"{curve['dataset']}: everything charged so far"
        pld = [
            (delta, value)
            for delta, value in zip(curve["deltas"], curve["epsilon_pld"], strict=True)
            if value is not None
        ]
        drawn = chart.privacy_curve(
            title,
            {
                "Rényi": list(zip(curve["deltas"], curve["epsilon_rdp"], strict=True)),
                "privacy loss distributions": pld,
            },
            curve["delta"],
        )
        yield Section(
            f"Curve of {curve['dataset']}",
            [figure_of(drawn, f"epsilon against delta for everything charged to {curve['dataset']}")],
        )


def _mechanisms(body: dict[str, Any]) -> Section:
    head = ("run", "purpose", "C", "sigma", "q claimed", "q executed", "steps reserved", "executed", "in doubt")
    rows = [
        (
            row["run"],
            mechanism["purpose"],
            f"{mechanism['clipping_norm']:g}",
            f"{mechanism['noise_multiplier']:g}",
            f"{mechanism['sampling_probability_claimed']:g}",
            "-"
            if mechanism["sampling_probability_executed"] is None
            else f"{mechanism['sampling_probability_executed']:g}",
            str(mechanism["steps_claimed"]),
            str(mechanism["steps_executed"]),
            str(mechanism["steps_charged_without_release"]),
        )
        for row in body["runs"]
        for mechanism in row["mechanisms"]
    ]
    return Section("Mechanisms", [body["mechanism"], Table(head, rows, (3, 2, 1, 1.3, 1.6, 1.7, 1.9, 1.6, 1.6))])


def _failures(body: dict[str, Any]) -> Section:
    rows = [
        (
            row["run"],
            f"{row['round']} ({row['attempt']})",
            row["outcome"],
            f"{row['steps_charged']} of {row['steps_reserved']}",
            row["meaning"],
            row["reason"] or "-",
        )
        for row in body["failures"]
    ]
    if not rows:
        return Section("Failures and how each was charged", ["None."])
    head = ("run", "round (attempt)", "outcome", "steps charged", "meaning", "reason")
    return Section("Failures and how each was charged", [Table(head, rows, (2.4, 1.4, 1.4, 1.5, 3.6, 3.4))])


def _empirical(body: dict[str, Any]) -> Section:
    audit = body["empirical_audit"]
    if audit is None:
        return Section("Empirical audit", ["None was run for this statement."])
    result = audit["result"]
    plain = {name: value for name, value in result.items() if not isinstance(value, list)}
    section = Section(
        "Empirical audit",
        [
            f"A lower bound found by attack. Result file SHA-256 {audit['file_sha256']}.",
            Table(("figure", "value"), [(name, str(value)) for name, value in plain.items()]),
        ],
    )
    for name, values in result.items():
        rows = [value for value in values if isinstance(value, dict)] if isinstance(values, list) else []
        if rows:  # such as the audits of `fl-audit canaries`, one row each
            head = [key for key, value in rows[0].items() if not isinstance(value, dict)]
            section.blocks.append(f"{name}:")
            section.blocks.append(Table(head, [tuple(str(row.get(key, "")) for key in head) for row in rows]))
        powers = [row["power"] for row in rows if isinstance(row.get("power"), dict)]
        if powers:
            section.blocks.append("Chance that an audit of this size accuses an engine with a fault, by audit:")
            faults = [(fault, *(str(power.get(fault, "")) for power in powers)) for fault in powers[0]]
            section.blocks.append(Table(("fault", *(str(row.get("kind", name)) for row in rows)), faults))
    return section


def _digests(body: dict[str, Any]) -> Section:
    digests = body["digests"]
    section = Section("Digests")
    rows = [
        (
            f"{row['run']} {row['round']}",
            *(str(row[name] or "not kept") for name in ("base_model", "adapter", "spec", "update")),
        )
        for row in digests["releases"]
    ]
    section.blocks.append(Table(("run, round", "base model", "global adapter", "run spec", "update sent"), rows))
    section.blocks.append(
        Table(("code", "version or digest"), [tuple(pair) for pair in digests["code"].items()], (1, 4))
    )
    policy = digests["policy"]
    if policy is None:
        section.blocks.append("Policy: the site's configuration was not at hand.")
    else:
        rows = [(name, str(value)) for name, value in policy["policy"].items()]
        section.blocks.append(f"Policy (site.toml SHA-256 {policy['file_sha256']}):")
        section.blocks.append(Table(("limit", "value"), rows))
    return section


def _ledger(body: dict[str, Any]) -> Section:
    ledger = body["ledger"]
    pinned = ledger["checkpoints_held_against"]
    rows = [
        ("entries", f"{ledger['entries']}, {ledger['first']} to {ledger['last']}"),
        ("head", ledger["head"]),
        ("Merkle root", ledger["merkle_root"]),
        ("site's first key", ledger["key"]),
        ("verified", f"{'yes' if ledger['verified'] else 'NO'}, against {pinned} checkpoints of the coordinator"),
    ]
    return Section("The ledger that this was read from", [Table(("", ""), rows, (1, 4))])


def clean(text: str) -> str:
    """Return text that a page may show: without control characters."""
    return printable(text)
