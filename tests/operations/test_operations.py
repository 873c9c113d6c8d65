"""What an operator relies on, seen in one real federation that lives through a disaster (`drill.py`).

The drill runs in a network namespace of its own where the machine allows it: there, every packet that leaves
loopback is seen.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers.smallest import smallest_base, smallest_digest

HERE = Path(__file__).parent
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]


@dataclass
class Drill:
    """Where the drill left its files, and what it saw."""

    root: Path
    seen: dict[str, Any]
    alone: bool
    markers: dict[str, str]
    units: int

    def scrape(self, name: str) -> str:
        """The text of one scrape, e.g. `running/site/metrics`."""
        status, text = self.seen["scrapes"][name]
        assert status == 200, text
        return str(text)

    def metrics(self, name: str) -> dict[str, float]:
        """Every sample of a scrape: `name{label="value",…}` to its value."""
        return {
            sample.name + "".join(f"{{{key}={value}}}" for key, value in sorted(sample.labels.items())): sample.value
            for family in text_string_to_metric_families(self.scrape(name))
            for sample in family.samples
        }

    def logs(self) -> list[Path]:
        """Everything that any process printed or logged."""
        places = ("logs", "first-life", "coordinator/logs", "sites/hospital-001/logs", "sites/hospital-001/supernode")
        return [
            path
            for place in places
            for path in sorted((self.root / place).rglob("*"))
            if path.is_file() and (".log" in path.name or ".jsonl" in path.name)
        ]


def _may_be_alone() -> bool:
    """Whether this machine lets us make a network and a mount namespace with a TUN device."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0 or not Path("/dev/net/tun").exists():
        return False
    tried = subprocess.run(["unshare", "--net", "--mount", "ip", "link", "set", "lo", "up"], check=False, timeout=20)
    return tried.returncode == 0


@pytest.fixture(scope="module")
def drill(tmp_path_factory: pytest.TempPathFactory) -> Drill:
    """Run the drill once for all tests here."""
    from operations import drill as script

    root, alone = tmp_path_factory.mktemp("d"), _may_be_alone()
    before = ["unshare", "--net", "--mount"] if alone else []
    words = [str(root), str(smallest_base()), smallest_digest(), *(["--alone"] if alone else [])]
    line = [*before, sys.executable, str(HERE / "drill.py"), *words]
    done = subprocess.run(line, capture_output=True, text=True, timeout=850, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    seen = json.loads((root / "result.json").read_text())
    return Drill(root, seen, alone, script.MARKERS, script.UNITS)


def test_no_process_looks_up_a_name_or_dials_out(drill: Drill) -> None:
    """Not one packet left loopback, in an environment without any quieting variable; the control was seen."""
    if not drill.alone:
        pytest.skip("needs root, unshare and /dev/net/tun to have a network of its own")
    control = drill.seen["control"]
    assert "udp 192.0.2.53:53" in control
    assert "tcp 192.0.2.7:443" in control
    assert "tcp [2001:db8::7]:443" in control
    assert drill.seen["packets"] == []


def test_every_child_is_told_to_stay_offline(drill: Drill) -> None:
    """Gateway, SuperLink, ServerApp, tunnel, SuperNode and the rest all have the variables; the two commands that a
    person types set them for themselves."""
    found = [each for each in drill.seen["processes"] if " up --home" not in each["command"]]
    children = [each for each in found if "fl-client run" not in each["command"]]
    names = " ".join(each["command"] for each in children)
    for part in ("superlink", "gateway", "control", "launcher", "monitor", "serverapp",
                 "tunnel", "supernode", "clientapp"):  # fmt: skip
        assert part in names, part
    assert [each for each in children if each["lacking"]] == []


def test_the_run_goes_on_from_its_last_committed_round_and_sites_notice_a_pause_alone(drill: Drill) -> None:
    """The coordinator was killed and its home deleted; restored from a backup made in mid-run, it completes the run.
    The site's agent was never restarted, and no round is charged twice."""
    seen = drill.seen
    assert seen["backup"]["damaged"] == []
    assert 1 <= seen["restore"]["runs"]["drill"] < 3
    assert (seen["run"]["state"], seen["run"]["rounds_committed"]) == ("completed", 3)
    assert seen["agent_lived_on"]
    spends = [(each["round"], each["outcome"]) for each in seen["spends"]]
    assert spends == [(number, "settled") for number in (1, 2, 3)]
    assert seen["verify"][0] == 0, seen["verify"][1]


def test_a_ledger_from_an_old_backup_is_found_by_the_receipts(drill: Drill) -> None:
    """A copy of the site's ledger from mid-run is intact in itself; verify against the receipts finds it."""
    code, said = drill.seen["verify_old"]
    assert code != 0, said
    assert "receipt" in said


def test_both_halves_end_with_0_on_sigterm_and_leave_nothing_behind(drill: Drill) -> None:
    """Exit code 0, no process left, no socket left."""
    assert (drill.seen["site_exit"], drill.seen["coordinator_exit"]) == (0, 0)
    assert drill.seen["left_over"] == []
    assert list(drill.root.rglob("*.sock")) == []


def test_no_log_output_or_metric_holds_a_private_value(drill: Drill) -> None:
    """Texts, labels, patients, their number, tokens and keys are in no log, output or scrape of any process."""
    texts = {str(path.relative_to(drill.root)): path.read_text(errors="replace") for path in drill.logs()}
    texts |= {name: text for name, (_, text) in drill.seen["scrapes"].items()}
    for needed in ("logs/fl-server.log", "logs/hospital-001.log", "first-life/superlink.log", "running/site/metrics",
                   "coordinator/logs/gateway.log", "coordinator/logs/serverapp.log",
                   "sites/hospital-001/logs/agent.jsonl", "sites/hospital-001/supernode/supernode.log"):  # fmt: skip
        assert needed in texts
    assert "released update" in texts["sites/hospital-001/logs/agent.jsonl"]
    secrets = [*drill.markers.values(), drill.seen["token"].split(".")[2], *_key_lines(drill.root)]
    assert len(secrets) > 12
    for name, text in texts.items():
        assert [each for each in secrets if each in text] == [], name
        for count in (drill.units, 2 * drill.units):
            # A number that stands by itself: not a port, a process, a decimal or part of a hash.
            assert not re.search(rf"(?<![\w.:\[-]){count}(?![\w.])", text), (name, count)


def _key_lines(root: Path) -> Iterator[str]:
    """The secret lines of every private key, coordinator's and site's."""
    files = [*root.rglob("*.key"), *root.rglob("signing.pem"), *root.rglob("node_key")]
    assert len(files) >= 7
    for path in files:
        raw = path.read_bytes()
        if raw.startswith(b"-----BEGIN"):
            yield from (line for line in raw.decode().splitlines()[1:-1] if len(line) >= 40)
        else:
            yield raw.hex() if not raw.isascii() else raw.decode().strip()


def test_nothing_of_the_data_is_at_the_coordinator_or_in_its_backup(drill: Drill) -> None:
    """Neither the coordinator's home, with databases and adapters, nor the archive holds a planted marker."""
    places = [drill.root / "backup.tar", *(path for path in (drill.root / "coordinator").rglob("*") if path.is_file())]
    assert len(places) > 10
    for path in places:
        content = path.read_bytes()
        assert [each for each in drill.markers.values() if each.encode() in content] == [], path


def test_logs_are_json_lines_with_ids(drill: Drill) -> None:
    """Every process of ours writes the one format; the lines of a round carry run, round and site."""
    from fl_shared.runtime.logs import KEYS

    lines: dict[str, list[dict[str, Any]]] = {}
    for path in drill.logs():
        if path.parent.name == "logs" and path.parent.parent.name in ("coordinator", "hospital-001"):
            if path.name.startswith("superlink"):
                continue  # Flower's own text
            lines[path.name] = [json.loads(line) for line in path.read_text().splitlines()]
    for each in (line for found in lines.values() for line in found):
        assert [key for key in KEYS if key in each] == list(each)
    assert any(
        (line.get("run"), line.get("round"), line.get("site")) == ("drill", 2, "hospital-001")
        for line in lines["agent.jsonl"]
    )
    assert any(line.get("kind") == "round-committed" and line.get("round") == 3 for line in lines["serverapp.log"])
    assert any(line.get("run") == "drill" for line in lines["launcher.log"])


def test_metrics_tell_rounds_bytes_steps_and_epsilon(drill: Drill) -> None:
    """Both sides say what happened; the coordinator's epsilon is that of the receipt; both were ready."""
    coordinator, site = drill.metrics("completed/coordinator/metrics"), drill.metrics("completed/site/metrics")
    assert coordinator["concordat_rounds_committed_total"] == 3
    assert coordinator["concordat_runs{state=completed}"] == 1
    assert coordinator["concordat_replies{code=}{site=hospital-001}{status=ok}"] == 3
    assert coordinator["concordat_received_bytes_total"] > 1000
    assert coordinator["concordat_gateway_requests_total{call=pull-messages}{status=200}"] > 0
    assert coordinator["concordat_gateway_bytes_total{direction=in}"] > 1000
    assert site["concordat_rounds_total{outcome=ok}"] >= 3
    assert site["concordat_step_seconds_count"] == 3 * 2
    assert site["concordat_bytes_total{direction=out}"] >= coordinator["concordat_received_bytes_total"]
    spent = site["concordat_epsilon{dataset=diagnoses}{part=spent}"]
    assert spent > 0
    assert coordinator["concordat_epsilon_spent{site=hospital-001}"] == pytest.approx(spent)
    left, ceiling = (site[f"concordat_epsilon{{dataset=diagnoses}}{{part={part}}}"] for part in ("left", "ceiling"))
    assert spent + left == pytest.approx(ceiling)
    assert site["concordat_helper_up{helper=tunnel}"] == site["concordat_helper_up{helper=supernode}"] == 1
    for who in ("coordinator", "site"):
        assert drill.scrape(f"completed/{who}/readyz") == "ready\n"
        assert drill.scrape(f"completed/{who}/healthz") == "ok\n"
    assert not [name for name in coordinator if "step" in name or ("seconds" in name and "site" in name and
                "timestamp" not in name)], "a site's durations are its own"  # fmt: skip
