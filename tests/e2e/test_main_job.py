"""The main job with real processes: a coordinator, two sites, Flower between them, an auditor at the end."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from fl_client.data.icd10 import hospital_split
from fl_client.identity.enrolment import Coordinator as Pinned
from fl_client.identity.renewal import certificate, renew
from fl_client.site.home import SiteHome
from fl_shared.audit.cli import main as fl_audit
from fl_shared.documents.spec import LORA_TARGETS
from harness import CommandError, Coordinator, Site, command, command_json, running
from helpers.coordinators import in_process
from helpers.smallest import smallest_base, smallest_digest
from helpers.specs import SpecFields, site_toml, write_spec

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

SITES = ("hospital-001", "hospital-002")
STEPS, SIGMA, Q = 2, 1.0, 0.05


USUAL = SpecFields(
    sites=SITES,
    rounds=2,
    quorum=2,
    round_timeout_s=120,
    max_tokens=24,
    rank=4,
    targets=LORA_TARGETS,
    noise_multiplier=SIGMA,
    sampling_probability=Q,
    steps_per_round=STEPS,
    learning_rate=0.05,
    head_learning_rate=2.0,
)


class Federation:
    """What the tests of this file share: one coordinator, two enrolled and running sites."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.coordinator = Coordinator(root)
        self.sites = [Site(name, root) for name in SITES]
        train, _ = hospital_split()
        self.labels = sorted({label for _, label in train})
        self.base = smallest_digest()
        for index, site in enumerate(self.sites):
            rows = train[index : 2400 : len(SITES)]
            with (root / f"{site.id}.csv").open("w", newline="", encoding="utf-8") as sink:
                csv.writer(sink).writerows([("text", "chapter"), *rows])

    def configure(self, site: Site, epsilon: float = 5.0) -> None:
        data = {"path": self.root / f"{site.id}.csv", "label_column": "chapter"}
        model = {"directory": smallest_base()}
        site.configure(site_toml(site.id, self.coordinator.url, data=data, model=model, budget={"epsilon": epsilon}))

    def launch(self, name: str, **changes: Any) -> str:
        fields: Any = USUAL | changes
        path = write_spec(self.root / f"{name}.toml", name=name, base_model=self.base, labels=self.labels, **fields)
        return self.coordinator.launch(path)


@pytest.fixture(scope="module")
def federation(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    """A running coordinator with two running sites."""
    made = Federation(tmp_path_factory.mktemp("federation"))
    made.coordinator.init()
    made.coordinator.start()
    with running(made.coordinator.service):
        for site in made.sites:
            site.enroll(made.coordinator.url, made.coordinator.invite(site.id))
            made.configure(site)
            site.check()
            site.start()
        with running(*(site.service for site in made.sites)):
            yield made


def audit(site: Site, verb: str, *arguments: str) -> Any:
    """What `fl-audit VERB --json` prints, in this process: a new one takes seconds, and there are twenty."""
    line = [verb, "--site", site.id, "--home", str(site.home), *arguments, "--json"]
    code, out, err = in_process(fl_audit, line)
    assert code == 0, err
    return json.loads(out)


def runs_of(site: Site) -> dict[str, float]:
    """Epsilon by run, as fl-audit prints it."""
    return {row["run"]: row["epsilon"] for row in audit(site, "spends")["runs"]}


def test_a_run_completes_and_every_site_ledger_has_a_row_for_every_round(federation: Federation) -> None:
    """Two rounds are committed; each site's ledger and the coordinator's receipts tell the same story."""
    run = federation.launch("first")
    shown = federation.coordinator.wait(run, timeout=300)
    assert shown["state"] == "completed", shown
    assert shown["rounds_committed"] == 2
    adapter = federation.root / "first.safetensors"
    federation.coordinator.admin("adapters", "export", run, "--out", str(adapter))
    assert adapter.stat().st_size > 10_000
    for site in federation.sites:
        rows = [row for row in audit(site, "spends")["spends"] if row["run"] == run]
        assert [row["round"] for row in rows] == [1, 2]
        assert all(row["mechanism"]["noise_multiplier"] == SIGMA for row in rows)
        assert all(row["mechanism"]["sampling_probability"] == Q for row in rows)
        assert sum(row["mechanism"]["steps"] for row in rows) == 2 * STEPS
        budget = audit(site, "budgets")["budgets"][0]
        assert budget["spent"] > 0
        assert budget["spent"] + budget["left"] == pytest.approx(budget["epsilon"])


def test_a_round_that_asks_for_less_noise_is_refused_and_costs_nothing(federation: Federation) -> None:
    """The site's policy has the last word; the admin reads its reason; the ledger has no row."""
    run = federation.launch("weak", noise_multiplier=0.6)
    shown = federation.coordinator.wait(run, timeout=200)
    assert shown["state"] == "failed"
    text = json.dumps(shown)
    assert "noise" in text
    assert "0.6" in text
    assert "0.8" in text
    assert all(run not in runs_of(site) for site in federation.sites)


def test_new_keys_of_coordinator_and_site_need_no_restart(federation: Federation) -> None:
    """The coordinator's key changes and a site renews its certificate; the next run completes as things stand."""
    site = federation.sites[0]
    pinned = Pinned.load(SiteHome(site.home))
    coordinator = str(federation.coordinator.home)
    change = command_json("fl-server", "rotate-key", "--home", coordinator, "--grace-days", "0")
    old = certificate(SiteHome(site.home)).serial_number
    renew(SiteHome(site.home), pinned)
    run = federation.launch("rotated", rounds=1, noise_multiplier=3.0)
    shown = federation.coordinator.wait(run, timeout=300)
    assert shown["state"] == "completed", shown
    for each in federation.sites:
        found = Pinned.load(SiteHome(each.home))
        assert found.coordinator_key == change["body"]["new_key"]
        assert found.previous_key in ("", pinned.coordinator_key)  # without a grace it goes at the next order
        assert run in runs_of(each)
    assert certificate(SiteHome(site.home)).serial_number != old


def test_a_round_over_budget_is_refused_with_a_typed_answer(federation: Federation) -> None:
    """A run that would pass the ceiling is refused as budget-exhausted, and the ceiling holds."""
    run = federation.launch("greedy", rounds=12, noise_multiplier=0.8, sampling_probability=0.2)
    shown = federation.coordinator.wait(run, timeout=400)
    text = json.dumps(shown)
    if shown["state"] == "completed":
        pytest.fail("the budget was meant to run out: " + text)
    assert "budget-exhausted" in text
    for site in federation.sites:
        budget = audit(site, "budgets")["budgets"][0]
        assert budget["spent"] <= budget["epsilon"]


def test_a_wrong_token_enrols_nobody(federation: Federation, tmp_path: Path) -> None:
    """A changed secret is refused with an error that says so, exit code not 0, no traceback, nothing left."""
    good = federation.coordinator.invite("hospital-009")
    parts = good.split(".")
    parts[2] = parts[2][::-1]
    bad = ".".join(parts)
    stranger = Site("hospital-009", tmp_path)
    with pytest.raises(CommandError) as failure:
        stranger.enroll(federation.coordinator.url, bad)
    assert "Traceback" not in failure.value.output
    assert "token" in failure.value.output
    stranger.enroll(federation.coordinator.url, good)


def test_exported_receipts_fit_every_ledger(federation: Federation, tmp_path: Path) -> None:
    """What the coordinator exports is what the auditor holds against the site's ledger: each receipt pins it."""
    for site in federation.sites:
        out = tmp_path / f"{site.id}.json"
        made = federation.coordinator.admin("receipts", "export", "--site", site.id, "--out", str(out))
        report = audit(site, "verify", "--receipts", str(out))
        assert made["receipts"] >= 2
        assert (report["intact"], report["receipts"]) == (True, made["receipts"])


def test_the_auditor_verifies_every_ledger(federation: Federation) -> None:
    """fl-audit verify passes on what the runs above left."""
    for site in federation.sites:
        command("fl-audit", "verify", "--site", site.id, "--home", str(site.home))
