"""What a hostile coordinator learns when a computation at a site fails: one answer, and then nothing."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from fl_client.agent.orders import Assignment, ReceivedOrder
from fl_client.agent.releases import ReleaseStore
from fl_client.agent.rounds import Rounds
from fl_shared.errors import EngineError
from fl_shared.identity.signing import sign_document
from fl_shared.ledger.suspension import MAX_FAILED_RUNS, confirm_run
from helpers.agents import RealSite, body, spec
from helpers.gateway import Gateway
from helpers.sites import POLICY, Site, site_spec
from helpers.smallest import smallest_digest

# Training fails, after it has read the data, because of one record: as an adapter can make it that overflows on a word.
FAILS_ON_ONE_RECORD = """
from fl_client.training import round as training
from fl_shared.errors import EngineError

right = training.train_round

def train_round(model, data, *args, **named):
    if any(text.endswith("cough number 7") for text in data.texts):
        raise EngineError("a gradient is NaN or infinite", fix="-")
    return right(model, data, *args, **named)

training.train_round = train_round
"""


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway) -> Iterator[RealSite]:
    """An enrolled site with data; whatever agent is left is killed."""
    made = RealSite(tmp_path / "home", gateway, epsilon=200.0)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


@pytest.mark.timeout(600)
def test_a_record_that_makes_training_fail_is_told_once_a_run(site: RealSite, tmp_path: Path) -> None:
    """Fresh rounds, repeats, a restart and a restored home change nothing; the operator's word does, in the ledger."""
    patched = tmp_path / "patched"
    patched.mkdir()
    (patched / "sitecustomize.py").write_text(FAILS_ON_ONE_RECORD)
    made_for = spec(smallest_digest())
    path = os.pathsep.join(filter(None, [str(patched), os.environ.get("PYTHONPATH", "")]))

    def codes(run: str, *numbers: int) -> list[str]:
        return [body(site.order(site.manifest(number, made_for, run=run))).get("code", "ok") for number in numbers]

    site.start(PYTHONPATH=path)
    assert codes("demo-1", 1, 1, 2, 3) == ["failed", "suspended", "suspended", "suspended"]
    told = body(site.order(site.manifest(4, made_for)))["message"]
    assert "gradient" not in told
    site.kill()
    shutil.rmtree(site.home.releases)  # the home comes from a backup; the ledger is the record
    site.home.ledger_head.unlink()
    site.start(PYTHONPATH=path)
    assert codes("demo-1", 5) == ["suspended"]
    # Nor do further runs buy further answers without end.
    others = [codes(f"other-{number}", 1)[0] for number in range(MAX_FAILED_RUNS)]
    assert others == ["failed"] * (MAX_FAILED_RUNS - 1) + ["suspended"]
    assert [spend.outcome for spend in site.spends()] == ["in-doubt"] * MAX_FAILED_RUNS

    shown = json.loads(site.run("fl-client", "status", "--json").stdout)
    assert set(shown["suspended"]) == {"demo-1", "other-0", "other-1"}
    assert "fl-client resume --site hospital-001 demo-1" in site.run("fl-client", "status").stdout
    assert site.run("fl-client", "resume", "demo-1").returncode == 2
    assert site.run("fl-client", "resume", "another", "--by", "x", "--reason", "y").returncode == 13
    done = site.run(
        "fl-client", "resume", "demo-1", "--by", "A. Officer", "--reason", "the adapter was looked at", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert codes("demo-1", 6, 7) == ["failed", "suspended"]  # the word was for one more try, and the agent ran on
    assert site.run("fl-client", "resume", "demo-1", "--by", "A. Officer", "--reason", "again").returncode == 0
    site.kill()
    site.start()  # and without what made it fail:
    assert codes("demo-1", 6, 7) == ["failed", "ok"]
    assert site.stop() == 0


def _raise(error: Exception) -> None:
    raise error


@pytest.fixture
def small(tmp_path: Path) -> Site:
    """A site with a real ledger and a small trainer."""
    return Site(tmp_path)


def test_what_reads_nothing_private_is_told_and_costs_nothing(small: Site) -> None:
    """Whatever fails while the model is prepared: typed, with its message, nothing reserved, and tried again."""
    problems: list[Exception] = [
        EngineError("a olmoe model has no shared_experts", fix="take 'shared_experts' out of [lora] targets"),
        ZeroDivisionError("/home/site/secret/path"),
    ]
    small.rounds = Rounds(
        small.facts, ledger=small.ledger, store=small.store, outgoing=small.outgoing, train=small.trainer,
        prepare=lambda *_: _raise(problems[0]) if problems else None,
    )  # fmt: skip
    told = body(small.order(small.manifest()))
    assert told["code"] == "unsupported-spec"
    assert "no shared_experts" in told["message"]
    assert "out of [lora] targets" in told["message"]
    problems.pop(0)
    told = body(small.order(small.manifest()))
    assert told["code"] == "unsupported-spec"
    assert "secret" not in told["message"]
    assert (small.outcomes(), small.trainer.calls, list((small.root / "releases").iterdir())) == ([], 0, [])
    problems.clear()
    assert small.order(small.manifest()).status == "ok"


def test_a_target_that_the_base_lacks_costs_nothing(small: Site) -> None:
    """The documented spec on a base without shared experts: refused with the fix, before anything is reserved."""
    small.facts = dataclasses.replace(small.facts, targets=("attention", "routed_experts"))
    small.rounds = Rounds(
        small.facts, ledger=small.ledger, store=small.store, outgoing=small.outgoing, train=small.trainer
    )
    told = body(small.order(small.manifest(spec=site_spec(targets=["attention", "shared_experts"]))))
    assert told["code"] == "unsupported-spec"
    assert "no shared_experts" in told["message"]
    assert "attention, routed_experts" in told["message"]
    assert small.outcomes() == []
    assert small.order(small.manifest()).status == "ok"


def test_a_coordinator_cannot_order_in_the_sites_own_name_space(small: Site) -> None:
    """The private baseline is neither handed out nor charged for; the site's own key cannot go the other way."""
    alone = dataclasses.replace(small.facts, namespace="alone:")
    own = Rounds(
        alone, ledger=small.ledger, store=small.store, outgoing=type(small.outgoing)(small.key, small.ledger, "alone:"),
        train=small.trainer,
    )  # fmt: skip
    coordinators, small.rounds = small.rounds, own
    baseline = small.order(small.manifest(run="alone:demo"))
    assert baseline.status == "ok"
    assert body(small.order(small.manifest(run="demo")))["code"] == "bad-manifest"
    small.rounds = coordinators
    before = small.outcomes()
    for number in (1, 2):
        refused = small.order(small.manifest(number, run="alone:demo"))
        assert (refused.status, refused.payload, body(refused)["code"]) == ("refused", b"", "bad-manifest")
    assert small.outcomes() == before
    receipt_entry = body(baseline)["entry_id"]
    order = small.store.find("alone:demo", 1)
    assert order is not None
    signed = json.dumps(sign_document(small.coordinator, small.manifest(run="alone:demo").to_dict()))
    assigned = Assignment.of(ReceivedOrder.read(signed, small.facts.site), "")
    with pytest.raises(Exception, match="belongs to others"):  # the second lock: the choke point itself
        small.rounds._release(assigned, order, receipt_entry, baseline.payload)
    assert small.order(small.manifest(run="alone")).payload != baseline.payload
    names = {path.name for path in (small.root / "releases").glob("*.safetensors")}
    assert names == {"alone_demo-1.safetensors", "alone-1.safetensors"}


def test_refused_orders_leave_nothing_on_the_disk(tmp_path: Path) -> None:
    """A coordinator without budget may order as often as it likes: no file, no memory; a crash's remnant goes, too."""
    small = Site(tmp_path, epsilon=0.5)
    spec_ = site_spec(noise_multiplier=0.8, sampling_probability=0.2, steps_per_round=20)
    for number in range(20):
        told = body(small.order(small.manifest(run=f"run-{number}", spec=spec_)))
        assert told["code"] == "budget-exhausted"
    assert list((tmp_path / "releases").iterdir()) == []
    assert (small.rounds._nonces, small.rounds._specs) == ({}, {})
    ordered = Site(tmp_path / "second")
    ordered.order(ordered.manifest())
    (path,) = (ordered.root / "releases").glob("*.json")
    remnant = json.loads(path.read_text()) | {"round": 2, "update_digest": None, "executed": None}
    (path.parent / "demo-1-2.json").write_text(json.dumps(remnant))
    ordered.open()
    assert [path.name for path in (ordered.root / "releases").glob("*.json")] == ["demo-1-1.json"]


@pytest.mark.parametrize("fails", [False, True])
def test_answers_leave_at_public_moments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool) -> None:
    """However long training took, the answer waits for the next multiple, and until then the site says `training`.

    An update is settled at that moment, too, and its receipt bears it.
    """
    small = Site(tmp_path, policy=dataclasses.replace(POLICY, reply_every_s=7.0))
    clock, durations, wall = [1000.0], [0.5, 6.9, 30.0], time.time()
    waits: list[tuple[float, str]] = []
    settled_at: list[int] = []
    monkeypatch.setattr(time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(time, "time", lambda: wall + clock[0])

    class Stop(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            settled_at.append(small.ledger.head().entries)
            waits.append((timeout or 0.0, small.rounds.state))
            clock[0] += timeout or 0.0
            return False

    small.rounds._stopping = Stop()

    def work() -> None:
        clock[0] += durations[0]
        if fails:
            raise EngineError("one record", fix="-")

    small.trainer.before = work
    for number in (1, 2, 3):
        began = clock[0]
        answer = small.order(small.manifest(number))
        assert answer.status == ("failed" if fails else "ok")
        assert (clock[0] - began) % 7.0 == pytest.approx(0.0, abs=1e-6) or 7.0 - (clock[0] - began) % 7.0 < 1e-6
        assert waits[-1][1] == "training"
        assert json.loads(answer.document)["body"]["created_at"] == pytest.approx(wall + clock[0], abs=1e-3)
        assert small.ledger.head().entries == settled_at[-1] + (0 if fails else 1)
        assert small.rounds.state == "idle"
        if fails:
            confirm_run(small.ledger, "demo-1", "officer", "test")
        durations.pop(0)
    before = len(waits)
    small.order(small.manifest(3))  # computed before, or refused: nothing private decides when it leaves
    assert len(waits) == before


def test_a_round_that_breaks_off_is_computed_again_ten_times_at_most(small: Site) -> None:
    """A crash may be due to one record: under one reservation it can be repeated, but not without end."""

    class Crash(BaseException):
        pass

    small.trainer.before = lambda: _raise(Crash())  # type: ignore[arg-type]  # no Exception, as kill -9 is none
    for _ in range(11):
        with pytest.raises(Crash):
            small.order(small.manifest())
        small.rounds.state = "idle"
        small.open()
    assert body(small.order(small.manifest()))["code"] == "suspended"
    assert small.outcomes() == [(1, "open")]
    small.trainer.before = lambda: None
    confirm_run(small.ledger, "demo-1", "officer", "memory was added")
    assert small.order(small.manifest()).status == "ok"
    assert small.outcomes() == [(1, "settled")]


def test_a_release_store_refuses_no_legitimate_name(tmp_path: Path) -> None:
    """Orders of both name spaces are found again by their own run, and by no other."""
    small = Site(tmp_path)
    small.order(small.manifest(run="a-1"))
    store = ReleaseStore(tmp_path / "releases")
    assert [order.run for order in store.all()] == ["a-1"]
    assert store.find("a", 1) is None
    assert store.find("alone:a-1", 1) is None
