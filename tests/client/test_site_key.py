"""The site's signing key: its public half in a file, and its replacement, killed at each step, by a new one."""

from __future__ import annotations

import json
import signal
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_client.agent.site import open_ledger
from fl_client.identity.enrolment import Coordinator, enrol
from fl_client.identity.keys import enrol_again
from fl_client.identity.keys import rotate as rotate_key
from fl_client.site.config import SiteConfig
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.verify import verify_ledger
from helpers.agents import SITE, RealSite
from helpers.gateway import Gateway
from helpers.ledgers import in_process, opened, with_budget
from helpers.parsers import parse, typed


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway) -> Iterator[RealSite]:
    """An enrolled site with a ledger; whatever agent is left is killed."""
    made = RealSite(tmp_path / "home", gateway)
    with opened(url(made), SigningKey.load(made.home.signing_key)) as ledger:
        with_budget(ledger)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def url(site: RealSite) -> str:
    """The address of the site's ledger."""
    return f"sqlite:///{site.home.ledger}"


def rotate(site: RealSite, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """`fl-client keys rotate`."""
    said = ("--by", "A. Officer", "--reason", "yearly")
    return site.run("fl-client", "keys", "rotate", *said, *words, **variables)


def changes(site: RealSite) -> list[str]:
    """The keys that the ledger names, the first one first."""
    with opened(url(site), None) as ledger:
        return [str(entry.body["public_key"]) for entry in ledger.key_entries()]


def test_an_enrolled_site_has_its_public_key_in_a_file(tmp_path: Path, gateway: Gateway) -> None:
    """Enrolment writes `keys/signing.pub`, `keys show` again, and the agent's own way to the ledger, too."""
    home = tmp_path / "home"
    words = ["enroll", "--server", gateway.url, "--token", gateway.token(SITE), "--site", SITE, "--home", str(home)]
    subprocess.run([sys.executable, "-m", "fl_client.cli.client", *words], check=True, capture_output=True)
    public, key = home / "keys" / "signing.pub", SigningKey.load(home / "keys" / "signing.pem").public_hex
    assert public.read_text() == f"{key}\n"
    assert stat.S_IMODE(public.stat().st_mode) == 0o600  # as every file of the home; the home is closed
    site = RealSite(tmp_path / "other", gateway)
    assert not site.home.public_key.exists()
    open_ledger(site.home, SiteConfig.load(site.home, SITE))[0].close()
    ours = SigningKey.load(site.home.signing_key).public_hex
    assert site.home.public_key.read_text() == f"{ours}\n"
    site.home.public_key.unlink()
    told = json.loads(site.run("fl-client", "keys", "show", "--json").stdout)
    assert told == {"signing_key": ours, "file": str(site.home.public_key)}
    assert site.home.public_key.read_text() == f"{ours}\n"


def test_verify_takes_the_home_s_key_when_none_is_given(site: RealSite) -> None:
    """It says whose word that is, and a ledger under another key is NOT INTACT; so after a rotation, too."""
    site.run("fl-client", "keys", "show")
    done = site.run("fl-audit", "verify")
    assert (done.returncode, "as its home says" in done.stdout, "INTACT" in done.stdout) == (0, True, True)
    assert json.loads(site.run("fl-audit", "verify", "--json").stdout)["pinned"] is False
    before = SigningKey.load(site.home.signing_key).public_hex
    assert rotate(site).returncode == 0
    for words in ((), ("--public-key", before), ("--public-key", str(site.home.public_key))):
        assert site.run("fl-audit", "verify", *words).returncode == 0, words
    site.home.public_key.write_text(SigningKey.generate().public_hex)
    done = site.run("fl-audit", "verify")
    assert (done.returncode, "the auditor knows" in done.stdout) == (13, True)


POINTS = ("rotate.made", "key.before-entry", "key.entry", "key.tree", "key.row", "key.committed", "rotate.renamed")


@pytest.mark.parametrize("point", POINTS)
@pytest.mark.parametrize("after", ["again", "agent"])
def test_a_rotation_survives_kill_9_at_each_step(site: RealSite, point: str, after: str) -> None:
    """One of two keys opens the ledger, the site finds out which; and the next call changes the key once in all."""
    first = SigningKey.load(site.home.signing_key).public_hex

    def change() -> None:
        rotate_key(site.home, url(site), SITE, "A. Officer", "yearly")

    assert in_process(change, {"FL_FAULT": point}) == -signal.SIGKILL, f"{point} was never reached"
    happened = point in ("key.committed", "rotate.renamed")
    assert len(changes(site)) == 1 + happened
    config = SiteConfig.load(site.home, SITE)
    if after == "agent":  # the way on which agent, train-alone and evaluate open the ledger
        ledger, key = open_ledger(site.home, config)
        with ledger:
            assert ledger.public_key() == key.public_hex
        assert len(changes(site)) == 1 + happened
        if happened:
            assert not site.home.next_signing_key.exists()
            assert site.home.public_key.read_text().strip() == key.public_hex
            return
    told = rotate_key(site.home, url(site), SITE, "A. Officer", "yearly")
    if happened and point == "rotate.renamed":  # nothing was left to complete: this is another rotation
        assert len(changes(site)) == 3
    else:
        assert changes(site) == [first, told.new_key]
    assert SigningKey.load(site.home.signing_key).public_hex == told.new_key == changes(site)[-1]
    assert site.home.public_key.read_text().strip() == told.new_key
    assert not site.home.next_signing_key.exists()
    report = verify_ledger(url(site), SITE, public_key=first)
    assert report.problems == []


@pytest.mark.parametrize("words", [("--by", ""), ("--reason", "")])
def test_a_rotation_without_a_word_changes_nothing(site: RealSite, words: tuple[str, str]) -> None:
    """Approver and reason are recorded in the ledger: neither may be missing, and no key is made."""
    before = {path.name: path.read_bytes() for path in site.home.keys.iterdir()}
    assert rotate(site, *words).returncode == 2
    assert {path.name: path.read_bytes() for path in site.home.keys.iterdir()} == before
    assert len(changes(site)) == 1


@pytest.mark.timeout(600)
def test_no_agent_starts_before_the_coordinator_knows_the_new_key(site: RealSite, gateway: Gateway) -> None:
    """It would be charged here and refused there. The fix is a line that enrols again; then the agent starts."""
    pinned = Coordinator.load(site.home)
    done = rotate(site)
    assert done.returncode == 0, done.stderr
    line = enrol_again(site.home, pinned)
    assert line in done.stdout
    parse(typed(line))
    new = SigningKey.load(site.home.signing_key).public_hex
    refused = site.run("fl-client", "run")
    assert refused.returncode == 17
    assert line in refused.stderr
    assert "Traceback" not in refused.stderr
    checks = json.loads(site.run("fl-client", "check", "--json").stdout)["checks"]
    assert [line in each["fix"] for each in checks if each["name"] == "server"] == [True]
    enrol(site.home, site=SITE, server=gateway.url, token=gateway.token(SITE), force=True)
    (path, request), *_ = [each for each in reversed(gateway.requests) if each[0] == "/v1/enroll"]
    assert (path, request["signing_public_key"]) == ("/v1/enroll", new)
    assert Coordinator.load(site.home).signing_key == new
    site.start()
    assert site.stop() == 0


def test_the_key_is_not_changed_under_a_running_agent(site: RealSite) -> None:
    """The agent holds the old key in memory: the verb is refused, and nothing has changed."""
    site.start()
    done = rotate(site)
    assert (done.returncode, "works for this site already" in done.stderr) == (2, True)
    assert len(changes(site)) == 1
    site.stop()


def test_an_enrolment_of_before_learns_which_key_the_coordinator_knows(site: RealSite) -> None:
    """`coordinator.json` of an older version names no signing key: the rotation notes it before it changes the key."""
    table = json.loads(site.home.coordinator.read_text())
    old = table.pop("signing_key")
    site.home.coordinator.write_text(json.dumps(table))
    assert rotate(site).returncode == 0
    assert Coordinator.load(site.home).signing_key == old
    assert site.run("fl-client", "run").returncode == 17
