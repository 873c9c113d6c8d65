"""The coordinator as processes: SuperLink, gateway, control API, launcher, SuperNodes; the agents stand in."""

from __future__ import annotations

import json
import sqlite3
import subprocess
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_shared.adapters.safetensors import digest, unpack
from fl_shared.documents.round import Receipt
from fl_shared.identity.signing import open_document
from helpers.coordinators import BIN, Coordinator, committed, coordinator, environment, until
from helpers.specs import write_spec
from helpers.stand_in_agent import SHAPES, honest_update

HONEST = ("h-1", "h-2")
SITES = (*HONEST, "x-1", "x-2")

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def one() -> Iterator[Coordinator]:
    """One coordinator with four sites for the whole module."""
    with coordinator(*SITES) as made:
        yield made


def _expected(rounds: list[list[str]]) -> dict[str, np.ndarray]:
    """The adapter after rounds in which these sites' honest updates were averaged."""
    total = {name: np.zeros(shape) for name, shape in SHAPES.items()}
    for number, sites in enumerate(rounds, start=1):
        for name in total:
            total[name] += np.mean([honest_update(site, number)[name].astype(np.float64) for site in sites], axis=0)
    return total


def _adapter(one: Coordinator, run: str) -> dict[str, np.ndarray]:
    out = one.root / f"{run}.safetensors"
    one.run("fl-admin", "adapters", "export", run, "--out", str(out), "--force")
    return dict(unpack(out.read_bytes()))


def _require_equal(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> None:
    assert set(found) == set(wanted)
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_wrong_replies_are_rejected_by_name_and_others_are_unaffected(one: Coordinator) -> None:
    """Each way of answering wrongly leaves its name in the history; the adapter is the honest sites' mean."""
    one.plan("x-1", **{"mixed/1": "refuse", "mixed/2": "wrong-signature", "mixed/3": "shapes", "mixed/4": "nan"})
    one.plan("x-2", **{"mixed/1": "ok", "mixed/2": "replay", "mixed/3": "wrong-digest", "mixed/4": "garbage"})
    one.launch(name="mixed", sites=SITES, rounds=4, quorum=2)
    shown = one.wait("mixed", "completed", "failed")
    assert shown["state"] == "completed", shown
    told = {
        (reply["site"], each["round"]): (reply["status"], reply["code"])
        for each in shown["history"]
        for reply in each["replies"]
    }
    assert told["x-1", 1] == ("refused", "budget-exhausted")
    assert told["x-1", 2] == ("invalid", "bad-signature")
    assert told["x-1", 3] == ("invalid", "bad-update")
    assert told["x-1", 4] == ("invalid", "bad-update")
    assert told["x-2", 1] == ("ok", "")
    assert told["x-2", 2] == ("invalid", "wrong-round")
    assert told["x-2", 3] == ("invalid", "wrong-digest")
    assert told["x-2", 4][0] == "invalid"
    assert all(told[site, number] == ("ok", "") for site in HONEST for number in (1, 2, 3, 4))
    refusal = next(r for r in shown["history"][0]["replies"] if r["site"] == "x-1")
    assert refusal["message"] == "epsilon 7.9 of 8 is spent"
    printed = one.run("fl-admin", "runs", "show", "mixed").stdout
    assert "x-1: refused: budget-exhausted: epsilon 7.9 of 8 is spent" in printed
    _require_equal(_adapter(one, "mixed"), _expected([[*HONEST, "x-2"], *[list(HONEST)] * 3]))


def test_committed_rounds_have_adapters_receipts_and_events(one: Coordinator) -> None:
    """Every committed round is on disk under its digest, and each receipt opens with its site's own key."""
    listed = one.admin("adapters", "list", "mixed")["adapters"]
    assert [each["round"] for each in listed] == [1, 2, 3, 4]
    for each in listed:
        data = committed(one.home, "mixed", each["round"])
        assert (digest(data), len(data)) == (each["digest"], each["bytes"])
    database = sqlite3.connect(f"file:{one.home / 'coordinator.sqlite'}?mode=ro", uri=True)
    rows = database.execute("SELECT site, document_json FROM replies WHERE run = 'mixed' AND status = 'ok'").fetchall()
    database.close()
    assert len(rows) == 9
    for site, document in rows:
        receipt = Receipt.from_dict(open_document(json.loads(document), one.keys[site].signing.public_hex))
        assert receipt.site == site


def test_the_first_answer_does_not_decide_what_an_adapter_is(one: Coordinator) -> None:
    """In a first round a site that answers before the others with other tensors does not shut them out."""
    one.plan("x-1", **{"race/1": "names"})
    for site in HONEST:
        one.plan(site, **{"race/1": "sleep:6"})
    one.launch(name="race", sites=(*HONEST, "x-1"), rounds=1, quorum=2)
    shown = one.wait("race", "completed", "failed")
    assert shown["state"] == "completed", shown["reason"]
    told = {reply["site"]: (reply["status"], reply["code"]) for reply in shown["history"][0]["replies"]}
    assert told == {"h-1": ("ok", ""), "h-2": ("ok", ""), "x-1": ("invalid", "bad-update")}
    _require_equal(_adapter(one, "race"), _expected([list(HONEST)]))


def test_a_missed_quorum_fails_by_name_and_the_run_can_be_resumed(one: Coordinator) -> None:
    """A run that cannot reach its quorum names each site's answer; once they take part it goes on."""
    one.plan("x-1", **{"quorum/1": "refuse"})
    one.plan("x-2", **{"quorum/1": "refuse"})
    one.launch(name="quorum", sites=("h-1", "x-1", "x-2"), rounds=1, quorum=2)
    shown = one.wait("quorum", "failed", "completed")
    assert shown["state"] == "failed"
    assert "1 of the 2" in shown["reason"] or "0 of the 2" in shown["reason"]
    assert "budget-exhausted" in shown["reason"]
    assert shown["reason_code"] == "quorum-missed"
    assert "x-1" in shown["reason"]
    for site in ("x-1", "x-2"):
        one.plan(site)
    one.run("fl-admin", "runs", "resume", "quorum")
    shown = one.wait("quorum", "completed", "failed")
    assert shown["state"] == "completed", shown["reason"]
    assert one.computed("h-1").count("quorum/1") == 1
    _require_equal(_adapter(one, "quorum"), _expected([["h-1", "x-1", "x-2"]]))


def _told(shown: dict[str, Any], round: int) -> dict[str, tuple[str, str]]:
    """Site to status and code of one round."""
    history: dict[str, Any] = next((each for each in shown["history"] if each["round"] == round), {"replies": []})
    return {reply["site"]: (reply["status"], reply["code"]) for reply in history["replies"]}


def _insist(one: Coordinator, run: str, true: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
    """Wait for something; on a slow machine a short deadline may fail the run, which is then resumed."""
    shown: dict[str, Any] = {}

    def there() -> bool:
        nonlocal shown
        shown = one.show(run)
        if shown["state"] == "failed":
            one.run("fl-admin", "runs", "resume", run)
        return true(shown)

    until(there, f"what was waited for; the run is {shown}", 300.0)
    return shown


def test_a_straggler_is_late_in_its_round_and_takes_part_again_afterwards(one: Coordinator) -> None:
    """At the deadline the quorum is enough; the late reply is kept with its receipt, averaged by nobody.

    The straggler is asked for the next round when its late reply is in, and trains no round twice.
    """
    one.plan("x-1", **{"slow/1": "wait"})
    for site in HONEST:
        one.plan(site, **{"slow/2": "wait"})
    one.launch(name="slow", sites=(*HONEST, "x-1"), rounds=2, quorum=2, round_timeout_s=25.0)
    _insist(one, "slow", lambda shown: shown["rounds_committed"] == 1)
    assert _told(one.show("slow"), 1) == {
        "h-1": ("ok", ""), "h-2": ("ok", ""), "x-1": ("missing", "no-answer")
    }  # fmt: skip
    one.let_go("x-1")
    _insist(one, "slow", lambda _: "slow/2" in one.computed("x-1"))
    one.let_go(*HONEST)
    shown = _insist(one, "slow", lambda shown: shown["state"] == "completed")
    assert _told(shown, 1)["x-1"] == ("late", "late")
    assert _told(shown, 2) == dict.fromkeys((*HONEST, "x-1"), ("ok", ""))
    assert [each for each in one.computed("x-1") if each.startswith("slow/")] == ["slow/1", "slow/2"]
    kept = sqlite3.connect(f"file:{one.home / 'coordinator.sqlite'}?mode=ro", uri=True)
    (document,) = kept.execute("SELECT document_json FROM replies WHERE run = 'slow' AND status = 'late'").fetchone()
    kept.close()
    receipt = Receipt.from_dict(open_document(json.loads(document), one.keys["x-1"].signing.public_hex))
    assert (receipt.run, receipt.round) == ("slow", 1)
    _require_equal(_adapter(one, "slow"), _expected([list(HONEST), [*HONEST, "x-1"]]))


def test_runs_at_once_on_other_sites_and_models_do_not_wait_for_each_other_and_shared_sites_take_turns(
    one: Coordinator,
) -> None:
    """A run that waits for its site holds up no other run; a second run on that site waits in line."""
    one.plan("h-1", **{"left/1": "wait"})
    one.launch(name="left", sites=("h-1",), rounds=2, quorum=1)
    until(lambda: one.reached("h-1", "left/1"), "the order of the first run is at the shared site")
    one.launch(name="right", sites=("h-2",), rounds=2, quorum=1, base_model="sha256:" + "b" * 64)
    one.launch(name="both", sites=("h-1", "h-2"), rounds=1, quorum=2)
    assert one.wait("right", "completed", "failed")["state"] == "completed"
    until(lambda: "both/1" in one.computed("h-2"), "the third run has one of its two answers")
    assert one.show("left")["state"] == "running"
    assert "both/1" not in one.computed("h-1")
    one.let_go("h-1")
    for run in ("left", "both"):
        shown = one.wait(run, "completed", "failed")
        assert shown["state"] == "completed", shown["reason"]
    for site, run, rounds in (("h-1", "left", 2), ("h-2", "right", 2), ("h-1", "both", 1), ("h-2", "both", 1)):
        own = [each for each in one.computed(site) if each.startswith(f"{run}/")]
        assert own == [f"{run}/{number}" for number in range(1, rounds + 1)]
    _require_equal(_adapter(one, "left"), _expected([["h-1"]] * 2))
    _require_equal(_adapter(one, "right"), _expected([["h-2"]] * 2))
    _require_equal(_adapter(one, "both"), _expected([["h-1", "h-2"]]))


def test_a_site_joins_in_mid_run_and_another_leaves(one: Coordinator) -> None:
    """A site that enrols after the launch takes part from the next round on; nobody waits for a revoked one."""
    one.invite("j-1")
    one.plan("h-1", **{"moving/1": "wait"})
    one.plan("x-2", **{"moving/3": "wait"})
    one.launch(name="moving", sites=("h-1", "j-1", "x-2"), rounds=3, quorum=1)
    until(lambda: "moving/1" in one.computed("x-2"), "round 1 is under way")
    one.enrol("j-1")
    one.start_agents("j-1")
    one.start_node("j-1")
    until(lambda: _told(one.show("moving"), 1) == {} and _is_online(one, "j-1"), "the joiner is online")
    one.let_go("h-1")
    until(lambda: {"moving/3"} <= set(one.computed("h-1")) & set(one.computed("j-1")), "two of three have answered")
    one.run("fl-admin", "sites", "revoke", "x-2")
    shown = one.wait("moving", "completed", "failed")
    assert shown["state"] == "completed", shown["reason"]
    assert _told(shown, 1) == {"h-1": ("ok", ""), "j-1": ("missing", "not-enrolled"), "x-2": ("ok", "")}
    assert _told(shown, 2) == {"h-1": ("ok", ""), "j-1": ("ok", ""), "x-2": ("ok", "")}
    assert _told(shown, 3) == {"h-1": ("ok", ""), "j-1": ("ok", ""), "x-2": ("missing", "not-enrolled")}
    left = next(reply for reply in shown["history"][2]["replies"] if reply["site"] == "x-2")
    assert left["message"] == "the site is revoked"
    _require_equal(_adapter(one, "moving"), _expected([["h-1", "x-2"], ["h-1", "j-1", "x-2"], ["h-1", "j-1"]]))


def _is_online(one: Coordinator, site: str) -> bool:
    """Whether Flower holds the site's node on line."""
    node = one.admin("sites", "show", site)["node_id"]
    return Flower(ServerHome.open(one.home)).nodes().get(node) == "online"


def test_a_stopped_run_ends_and_watch_shows_its_end(one: Coordinator) -> None:
    """`runs stop` in mid-round ends the run; a watcher comes to an end with it, and no round is committed."""
    for site in HONEST:
        one.plan(site, **{"long/1": "sleep:30"})
    one.launch(name="long", sites=HONEST, rounds=3, quorum=2)
    until(lambda: any(e["state"] == "running" for e in one.admin("runs", "list")["runs"]), "the run is running")
    one.run("fl-admin", "runs", "stop", "long")
    done = one.run("fl-admin", "runs", "watch", "long", check=False)
    assert "stopped" in done.stdout
    shown = one.show("long")
    assert (shown["state"], shown["rounds_committed"]) == ("stopped", 0)


def test_watch_streams_what_each_site_does_inside_a_round(one: Coordinator) -> None:
    """With --json one object a line, each as it happens: a site's order is told while the site is at work on it."""
    slow, *_ = HONEST
    one.plan(slow, **{"seen/1": "sleep:20"})
    one.launch(name="seen", sites=HONEST, rounds=1, quorum=len(HONEST))
    watching = subprocess.Popen(
        [str(BIN / "fl-admin"), "runs", "watch", "seen", "--json"],
        env=environment(FL_SERVER_HOME=str(one.home)), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert watching.stdout is not None
    seen = []
    for line in watching.stdout:
        seen.append(json.loads(line))
        if (seen[-1].get("kind"), seen[-1].get("site")) == ("site-asked", slow):
            assert watching.poll() is None
            assert one.show("seen")["state"] == "running"
    assert watching.wait(60) == 0
    assert (seen[-1]["run"], seen[-1]["state"]) == ("seen", "completed")
    told = [(each["kind"], each["site"]) for each in seen[:-1] if each["round"] == 1 and each["site"]]
    for site in HONEST:
        assert told.index(("site-asked", site)) < told.index(("reply-ok", site))


def test_a_node_with_a_key_of_its_own_is_not_admitted(one: Coordinator) -> None:
    """A SuperNode whose key was never enrolled is turned away by the SuperLink."""
    stranger = one.root / "stranger"
    stranger.mkdir()
    key = ec.generate_private_key(ec.SECP384R1())
    pem = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    (stranger / "node.key").write_bytes(pem)
    (stranger / "node.key").chmod(0o600)
    node = one.start_node("stranger", stranger / "node.key")
    until(lambda: node.poll() is not None, "the stranger's SuperNode ends", 90.0)
    assert node.returncode != 0


def test_a_refused_launch_names_what_is_wrong(one: Coordinator) -> None:
    """A taken name and a site that is not enrolled end with exit code 18 and one message."""
    for name, sites, word in (("mixed", HONEST, "already"), ("fresh", ("h-1", "nobody"), "nobody")):
        spec = write_spec(one.root / "refused.toml", name=name, sites=sites, rounds=1, quorum=1)
        done = one.run("fl-admin", "runs", "launch", str(spec), check=False)
        assert done.returncode == 18
        assert word in done.stderr
        assert "Traceback" not in done.stderr


def test_sigterm_ends_everything(one: Coordinator) -> None:
    """After SIGTERM `fl-server up` ends with status 0 and leaves no process of its own behind."""
    import psutil

    assert one.process is not None
    children = psutil.Process(one.process.pid).children(recursive=True)
    assert len(children) >= 4
    assert one.down() == 0
    _gone, alive = psutil.wait_procs(children, timeout=15)
    assert alive == [], [each.cmdline() for each in alive]
