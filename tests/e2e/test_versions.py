"""Two versions in one run, as real processes: an old site under a new coordinator, a new one under an old coordinator.

The version before is a commit of this repository, built as a wheel and installed into a folder of its own, whose
modules every one of its processes loads. It is older than the orders by digest (docs/decisions/0111), and its app
imports what it speaks from the site (docs/decisions/0110).
"""

from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from harness import Coordinator, Site, running
from helpers.smallest import smallest_base, smallest_digest

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]
BEFORE = "c6f74c1287963a42db1fb4bd46a93c4b7dda353a"
OLD, NEW = "hospital-old", "hospital-new"
LABELS = ("lungs", "heart")

SITE_TOML = """
[site]
id = "{site}"
[server]
url = "{url}"
[data]
name = "diagnoses"
path = "{data}"
text_column = "text"
label_column = "label"
privacy_unit = "record"
[model]
directory = "{base}"
device = "cpu"
threads = 1
[policy]
min_noise_multiplier = 0.8
max_clipping_norm = 1.0
max_sampling_probability = 0.2
max_steps_per_round = 4
[budget]
epsilon = 8.0
delta = 1e-5
approver = "privacy officer"
"""

SPEC = """
[run]
name = "versions"
base_model = "{base}"
sites = {sites}
rounds = 2
quorum = {quorum}
round_timeout_s = 240
[task]
kind = "classification"
labels = {labels}
max_tokens = 8
[lora]
rank = 2
targets = ["attention"]
[training]
noise_multiplier = 1.0
clipping_norm = 1.0
sampling_probability = 0.05
steps_per_round = 1
learning_rate = 0.05
head_learning_rate = 1.0
"""


def _run(*words: str, cwd: Path | None = None) -> None:
    done = subprocess.run(words, cwd=cwd, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}{done.stderr}"


@pytest.fixture(scope="session")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the version before, from its wheel."""
    known = ["git", "-C", str(ROOT), "cat-file", "-e", f"{BEFORE}^{{commit}}"]
    try:
        if subprocess.run(known, capture_output=True, check=False, timeout=60).returncode != 0:
            pytest.skip(f"commit {BEFORE[:7]} is not in this checkout (a shallow clone, or a source distribution)")
    except FileNotFoundError:
        pytest.skip(f"there is no git to take commit {BEFORE[:7]} from")
    made = tmp_path_factory.mktemp("before")
    source, wheels, installed = (made / name for name in ("source", "wheels", "installed"))
    source.mkdir()
    _run("git", "-C", str(ROOT), "archive", "--output", str(made / "source.tar"), BEFORE)
    _run("tar", "xf", str(made / "source.tar"), "-C", str(source))
    _run(sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(wheels), cwd=source)
    (wheel,) = wheels.glob("*.whl")
    line = ["install", "--quiet", "--no-deps", "--no-index", "--disable-pip-version-check", "--target", str(installed)]
    _run(sys.executable, "-m", "pip", *line, str(wheel))
    return installed


def train(coordinator: Coordinator, *sites: Site) -> None:
    """One run of two rounds; every ledger and the coordinator tell the same story."""
    root = coordinator.root
    coordinator.init()
    coordinator.start()
    with running(coordinator.service):
        for site in sites:
            site.enroll(coordinator.url, coordinator.invite(site.id))
            data = root / f"{site.id}.csv"
            rows = [f"cough number {number},{LABELS[number % 2]}" for number in range(120)]
            data.write_text("\n".join(["text,label", *rows]) + "\n")
            site.configure(SITE_TOML.format(site=site.id, url=coordinator.url, data=data, base=smallest_base()))
            site.start()
        with running(*(site.service for site in sites)):
            _wait_for_announcements(coordinator, sites)
            spec = root / "versions.toml"
            names = json.dumps([site.id for site in sites])
            fields = {"base": smallest_digest(), "quorum": len(sites), "sites": names, "labels": json.dumps(LABELS)}
            spec.write_text(SPEC.format(**fields))
            shown = coordinator.wait(coordinator.launch(spec), timeout=500)
            assert (shown["state"], shown["rounds_committed"]) == ("completed", 2), shown
    for site in sites:
        spends = site.audit("spends")["spends"]
        assert [(row["round"], row["outcome"]) for row in spends] == [(1, "settled"), (2, "settled")]
        assert site.audit("verify")["intact"]


def _query(coordinator: Coordinator, text: str) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(coordinator.home / "coordinator.sqlite", timeout=30)) as database:
        return database.execute(text).fetchall()


def _wait_for_announcements(coordinator: Coordinator, sites: Sequence[Site]) -> None:
    deadline = time.monotonic() + 240
    while _query(coordinator, "SELECT site FROM sites WHERE base_announced_at = 0"):
        for site in sites:
            site.service.check_alive()
        assert time.monotonic() < deadline, "the sites have not announced their base models"
        time.sleep(0.5)


def test_an_old_and_a_new_site_train_under_a_new_coordinator(before: Path, tmp_path: Path) -> None:
    """Each gets the order that it reads, in the same round; the shipped app runs at both."""
    coordinator = Coordinator(tmp_path)
    train(coordinator, Site(OLD, tmp_path, version=before), Site(NEW, tmp_path))
    assert _query(coordinator, "SELECT site, orders FROM sites ORDER BY site") == [(NEW, 2), (OLD, 0)]
    stored = _query(coordinator, "SELECT site, document_json FROM manifests WHERE run = 'versions'")
    assert all(json.loads(text)["body"]["kind"] == "round-manifest" for site, text in stored if site == OLD)
    assert {text for site, text in stored if site == NEW} == {""}
    assert {site for site, _ in stored} == {OLD, NEW}


def test_a_new_site_trains_under_an_old_coordinator(before: Path, tmp_path: Path) -> None:
    """The old app finds at the new site what it imports there, and the new agent reads the orders of old."""
    coordinator = Coordinator(tmp_path, version=before)
    train(coordinator, Site(NEW, tmp_path))
    assert "orders" not in {row[1] for row in _query(coordinator, "PRAGMA table_info(sites)")}  # it is the old one
    stored = _query(coordinator, "SELECT site, document_json FROM manifests WHERE run = 'versions'")
    assert {json.loads(text)["body"]["kind"] for _, text in stored} == {"round-manifest"}
    assert {site for site, _ in stored} == {NEW}
