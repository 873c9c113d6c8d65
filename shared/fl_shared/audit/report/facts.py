"""The facts of a statement, as plain JSON values: from the verified ledger and from what the site keeps beside it."""

from __future__ import annotations

import importlib.util
import math
import platform
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib import metadata as packages
from pathlib import Path
from typing import Any

from fl_shared import __version__
from fl_shared.audit.costs import by_run
from fl_shared.audit.report import words
from fl_shared.audit.report.history import history
from fl_shared.canonical import canonical_bytes, file_sha256, parse_json, sha256_hex
from fl_shared.errors import ConfigError
from fl_shared.ledger import LedgerReader, Spend
from fl_shared.ledger.chain import timestamp
from fl_shared.ledger.reader import position_of
from fl_shared.ledger.verify import Report
from fl_shared.privacy.accounting.merge import Key, key_of
from fl_shared.privacy.accounting.pld import pld_curve, steps_epsilon
from fl_shared.privacy.accounting.renyi import curve_epsilon
from fl_shared.toml import load_toml

PUBLIC_UNIT = "public"
DELTAS = tuple(10.0 ** (-10 + i / 4) for i in range(33))  # 1e-10 .. 1e-2
MOST_FAILURES = 1000


def statement(
    ledger: LedgerReader,
    report: Report,
    *,
    run: str | None,
    home: Path | None,
    empirical: Path | None,
    stated: dict[str, Any],
) -> dict[str, Any]:
    """Return the statement's body; `run` narrows mechanisms and failures to one run, never the cumulative figures.

    Raises ConfigError for a run that the ledger does not know or an empirical result that cannot be read.
    """
    everything = list(ledger.spends())
    spends = [spend for spend in everything if run in (None, spend.reservation.run)]
    if run is not None and not spends:
        known = sorted({spend.reservation.run for spend in everything})
        raise ConfigError(f"the ledger has no run {run!r}", fix=f"choose from {', '.join(known) or 'none'}")
    used = {spend.reservation.dataset for spend in spends}
    names = sorted(used if run is not None else {dataset.name for dataset in ledger.datasets()})
    runs = [row for row in by_run(ledger, everything) if run in (None, row["run"])]
    body = {
        "kind": "privacy-statement",
        "format": 2,
        "site": ledger.site,
        "stated": stated,
        "run": run,
        "made_at": timestamp(datetime.now(UTC)),
        "ledger": {
            "entries": report.entries,
            "head": report.head,
            "merkle_root": report.merkle_root,
            "key": report.key,
            "first": report.first,
            "last": report.last,
            "verified": report.intact,
            "checkpoints_held_against": report.checkpoints,
        },
        "guarantee": {
            "definition": words.DEFINITION,
            "neighbouring": words.NEIGHBOURING,
            "trust_model": words.TRUST_MODEL,
            "composition": words.COMPOSITION,
        },
        "datasets": [_dataset(ledger, name) for name in names],
        "runs": [row | {"mechanisms": _mechanisms(spends, row["run"], row["dataset"])} for row in runs],
        "curves": [_curve(ledger, name) for name in names if ledger.budgets(name)],
        "failures": [_failure(spend) for spend in spends if spend.outcome != "settled"][:MOST_FAILURES],
        "accountants": _accountants(),
        "randomness": words.RANDOMNESS,
        "mechanism": words.MECHANISM,
        "outside": list(words.OUTSIDE),
        "empirical_audit": _empirical(empirical),
        "digests": {
            "releases": _releases(home, spends),
            "code": code_digests(),
            "policy": _policy(home),
        },
        "crosswalk": [
            dict(zip(("provision", "asks", "served_by", "stays_with_the_site"), row, strict=True))
            for row in words.CROSSWALK
        ],
        "not_claimed": list(words.NOT_CLAIMED),
    }
    return body | {"id": statement_id(body)}


def statement_id(body: dict[str, Any]) -> str:
    """Return the number of a statement: its day, and the start of the SHA-256 of its body without that number."""
    plain = {name: value for name, value in body.items() if name != "id"}
    return f"PS-{body['made_at'][:10].replace('-', '')}-{sha256_hex(canonical_bytes(plain))[:12]}"


def _dataset(ledger: LedgerReader, name: str) -> dict[str, Any]:
    dataset = ledger.dataset(name)
    budgets = []
    for budget in ledger.budgets(name):
        past = [point.to_dict() for point in history(ledger, budget)]
        charges = ledger.charges(name, budget.study)
        position = position_of(budget, charges)
        budgets.append(
            {
                "study": budget.study,
                "epsilon": budget.epsilon,
                "delta": budget.delta,
                "delta_times_units": budget.delta * dataset.units,
                "spent": position.spent,
                "spent_pld": steps_epsilon(charges.spent, budget.delta),
                "reserved": position.reserved,
                "gate_used": position.used,
                "filter_order": budget.filter_order,
                "valid_from": budget.valid_from,
                "valid_to": budget.valid_to,
                "version": budget.version,
                "approver": budget.approver,
                "entry": budget.seq,
                "entered_at": ledger.entry(budget.seq).created_at,
                "best_guess_at_ceiling": best_guess(budget.epsilon, budget.delta),
                "best_guess_so_far": best_guess(position.spent, budget.delta),
                "burn_down": past,
            }
        )
    return {
        "name": name,
        "version": dataset.version,
        "privacy_unit": dataset.privacy_unit,
        "private": dataset.privacy_unit != PUBLIC_UNIT,
        "units": dataset.units,
        "bound_per_unit": dataset.bound_per_unit,
        "fingerprint": dataset.fingerprint,
        "overlaps": ledger.overlapping(name),
        "budgets": budgets,
    }


def best_guess(epsilon: float, delta: float) -> float:
    """Return how often the best guess is right whether one unit is in the data, when a fair coin put it in or not.

    (e^epsilon + delta) / (1 + e^epsilon), exact for (epsilon, delta): Kairouz, Oh, Viswanath, "The composition
    theorem for differential privacy" (arXiv 1311.0776), theorem 2.1: errors a, b have a + e^epsilon b >= 1 - delta.
    """
    return min(1.0, 1.0 - (1.0 - delta) * math.exp(-epsilon) / (1.0 + math.exp(-epsilon)))


def _mechanisms(spends: Sequence[Spend], run: str, dataset: str) -> list[dict[str, Any]]:
    """Return each kind of step that a run took: what was reserved (claimed) and what was charged (executed)."""
    rows: dict[tuple[str, float, Key], dict[str, Any]] = {}
    for spend in spends:
        reservation = spend.reservation
        if (reservation.run, reservation.dataset) != (run, dataset):
            continue
        key = key_of(reservation.mechanism)
        row = rows.setdefault(
            (reservation.purpose, reservation.mechanism.clipping_norm, key),
            {
                "purpose": reservation.purpose,
                "kind": key.kind,
                "neighbouring": key.neighbouring,
                "clipping_norm": reservation.mechanism.clipping_norm,
                "noise_multiplier": key.noise_multiplier,
                "sampling_probability_claimed": key.sampling_probability,
                "sampling_probability_executed": None,
                "steps_claimed": 0,
                "steps_executed": 0,
                "steps_charged_without_release": 0,
            },
        )
        row["steps_claimed"] += reservation.mechanism.steps
        if spend.charged is not None and spend.outcome == "settled":
            row["sampling_probability_executed"] = spend.charged.sampling_probability
            row["steps_executed"] += spend.charged.steps
        elif spend.charged is not None:
            row["steps_charged_without_release"] += spend.charged.steps
    return list(rows.values())


def _curve(ledger: LedgerReader, name: str) -> dict[str, Any]:
    """Return epsilon at every delta for all that is charged to the data set."""
    budget = ledger.budgets(name)[0]
    spent = ledger.charges(name, None).spent
    names = {name, *ledger.overlapping(name)}
    own = [
        spend.charged
        for spend in ledger.spends()
        if spend.charged is not None and spend.outcome != "open" and spend.reservation.dataset in names
    ]
    return {
        "dataset": name,
        "delta": budget.delta,
        "deltas": list(DELTAS),
        "epsilon_rdp": [curve_epsilon(spent, delta) for delta in DELTAS],
        # Below the truncated tail mass the accountant gives no finite figure.
        "epsilon_pld": [value if math.isfinite(value) else None for value in pld_curve(own, DELTAS)],
    }


def _failure(spend: Spend) -> dict[str, Any]:
    reservation = spend.reservation
    return {
        "run": reservation.run,
        "round": reservation.round,
        "dataset": reservation.dataset,
        "attempt": reservation.attempt,
        "outcome": spend.outcome,
        "steps_reserved": reservation.mechanism.steps,
        "steps_charged": 0 if spend.charged is None else spend.charged.steps,
        "meaning": words.OUTCOMES[spend.outcome],
        "reason": spend.reason,
        "entry": spend.settled_seq or reservation.seq,
    }


def _accountants() -> list[dict[str, str]]:
    version = packages.version("dp-accounting")
    return [
        {
            "name": "Rényi filter at a fixed order (decides)",
            "library": f"dp-accounting {version}",
            "source": "arXiv 2008.11193, 1908.10530, 2004.00010",
        },
        {
            "name": "Rényi composition, best order (reported)",
            "library": f"dp-accounting {version}",
            "source": "arXiv 1908.10530, 2004.00010",
        },
        {
            "name": "privacy loss distributions, pessimistic (reported)",
            "library": f"dp-accounting {version}",
            "source": "arXiv 2207.04380",
        },
    ]


def _empirical(path: Path | None) -> dict[str, Any] | None:
    """Return the result of an empirical audit as the file holds it, with the file's digest."""
    if path is None:
        return None
    if not path.is_file():
        raise ConfigError(f"no empirical audit at {str(path)!r}", fix="give the JSON file that the audit wrote")
    result = parse_json(path.read_bytes(), str(path))
    if not isinstance(result, dict):
        raise ConfigError(f"{path} holds no result", fix="give the JSON file that the audit wrote")
    return {"file_sha256": file_sha256(path), "result": result}


def _releases(home: Path | None, spends: Sequence[Spend]) -> list[dict[str, Any]]:
    """Return the digests of each release: of the update from the ledger, of its surroundings from the site's files."""
    rows = []
    for spend in spends:
        if spend.outcome != "settled":
            continue
        reservation = spend.reservation
        row = {
            "run": reservation.run,
            "round": reservation.round,
            "update": spend.release_digest,
            "base_model": None,
            "adapter": None,
            "spec": None,
            "entry": spend.settled_seq,
        }
        order = home / "releases" / f"{reservation.run.replace(':', '_')}-{reservation.round}.json" if home else None
        if order is not None and order.is_file():
            record = parse_json(order.read_bytes(), str(order))
            if isinstance(record, dict) and record.get("update_digest") == spend.release_digest:
                row |= {
                    "base_model": record.get("model_digest"),
                    "adapter": record.get("adapter_digest"),
                    "spec": record.get("spec_digest"),
                }
        rows.append(row)
    return rows


def _policy(home: Path | None) -> dict[str, Any] | None:
    """Return the site's policy and the digest of its file."""
    path = home / "site.toml" if home else None
    if path is None or not path.is_file():
        return None
    section = load_toml(path).get("policy")
    return {"file_sha256": file_sha256(path), "policy": section if isinstance(section, dict) else {}}


def code_digests() -> dict[str, str]:
    """Return versions, and one digest over the Python files of each of our packages that is installed."""
    digests = {
        "concordat": __version__,
        "python": platform.python_version(),
        "cryptography": packages.version("cryptography"),
        "dp-accounting": packages.version("dp-accounting"),
    }
    for name in ("fl_shared", "fl_client"):
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            root = Path(spec.submodule_search_locations[0])
            lines = [f"{file_sha256(path)}  {path.relative_to(root)}" for path in sorted(root.rglob("*.py"))]
            digests[name] = f"sha256:{sha256_hex(chr(10).join(lines).encode())}"
    return digests
