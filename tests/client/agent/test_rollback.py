"""A ledger that was rolled back is not taken up, by real processes on real files."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_shared.ledger.verify import verify_ledger
from helpers.agents import SITE, RealSite, spec
from helpers.gateway import Gateway
from helpers.smallest import smallest_digest


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway) -> Iterator[RealSite]:
    """An enrolled site with data; whatever agent is left is killed."""
    made = RealSite(tmp_path / "home", gateway)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def put_back(site: RealSite, old: Path) -> None:
    """Restore an old copy of the ledger, as somebody does who restores the wrong backup."""
    for ending in ("-wal", "-shm"):
        site.home.ledger.with_name(site.home.ledger.name + ending).unlink(missing_ok=True)
    shutil.copy(old, site.home.ledger)


@pytest.mark.timeout(600)
@pytest.mark.parametrize("known_by", ["head", "releases"])
def test_an_old_copy_of_the_ledger_is_not_taken_up(site: RealSite, tmp_path: Path, known_by: str) -> None:
    """The agent ends with the next step; the operator's recorded word enters what the home knows, and it goes on."""
    made_for, old = spec(smallest_digest()), tmp_path / "old.sqlite"
    site.start()
    assert site.order(site.manifest(1, made_for)).status == "ok"
    assert site.stop() == 0
    shutil.copy(site.home.ledger, old)
    site.start()
    released = site.order(site.manifest(2, made_for))
    assert released.status == "ok"
    assert site.stop() == 0
    spent, whole = site.epsilon(), [spend.release_digest for spend in site.spends()]

    put_back(site, old)
    assert site.epsilon() < spent
    if known_by == "releases":
        site.home.ledger_head.unlink()
    process = site.start(wait=False)
    said = site.finish()
    assert process.returncode == 13
    assert "was rolled back" in said
    assert "fl-client resume" in said
    assert "Traceback" not in said
    assert site.run("fl-client", "resume", "--ledger").returncode == 2
    done = site.run("fl-client", "resume", "--ledger", "--by", "A. Officer", "--reason", "the disk is lost", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == {"entered": 1}
    assert site.epsilon() == pytest.approx(spent, rel=1e-9)
    assert [spend.release_digest for spend in site.spends()] == whole
    assert site.run("fl-client", "resume", "--ledger", "--by", "x", "--reason", "y").returncode == 2
    site.start()
    assert site.order(site.manifest(2, made_for)).payload == released.payload
    assert site.stop() == 0
    assert verify_ledger(f"sqlite:///{site.home.ledger}", SITE).problems == []
