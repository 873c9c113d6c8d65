"""Rounds at a site: what is charged, what is refused, what a crash leaves, and what may leave."""

from __future__ import annotations

import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fl_client.agent.head import LedgerHead, require_newest
from fl_client.agent.rounds import Rounds, Stopping
from fl_shared.adapters.safetensors import digest, pack, unpack
from fl_shared.documents.round import Receipt, Refusal
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import DataError, LedgerError, RunError
from fl_shared.identity.signing import SigningKey, open_document
from helpers.sites import MODEL, POLICY, SITE, Site, Trained, body, site_spec, some_adapter


class Crash(BaseException):
    """Stands for kill -9: nothing catches it, nothing runs after it."""


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with a budget of epsilon 8."""
    return Site(tmp_path)


def test_a_round_is_settled_before_it_is_answered_and_the_receipt_says_so(site: Site) -> None:
    """The receipt is signed by the site and names the ledger entry that settled exactly these bytes."""
    adapter = some_adapter()
    manifest = site.manifest(adapter=adapter)
    sealed = site.order(manifest, adapter)
    assert sealed.status == "ok"
    receipt = Receipt.from_dict(open_document(json.loads(sealed.document), site.key.public_hex))
    assert receipt.manifest_digest == manifest.digest
    assert receipt.update_digest == digest(sealed.payload)
    assert receipt.mechanism == manifest.spec.mechanism()
    assert receipt.model_digest == MODEL
    (spend,) = site.ledger.spends()
    assert (spend.outcome, spend.release_digest) == ("settled", receipt.update_digest)
    assert receipt.entry_id == site.ledger.entry(spend.settled_seq or 0).id
    assert receipt.ledger_head == site.ledger.head().hash
    assert receipt.epsilon_spent_total == site.ledger.epsilon("records").spent > 0
    assert unpack(sealed.payload)["w"].shape == (4, 3)


def test_a_repeat_returns_the_stored_bytes_and_spends_nothing(site: Site) -> None:
    """The same order, and a new manifest for the same round, both get the same bytes and entry id."""
    manifest = site.manifest()
    first = site.order(manifest)
    again = site.order(manifest)
    renewed = site.manifest(nonce="another")
    third = site.order(renewed)
    assert first.payload == again.payload == third.payload
    assert body(first)["entry_id"] == body(third)["entry_id"]
    assert body(third)["manifest_digest"] == renewed.digest
    assert site.trainer.calls == 1
    assert site.outcomes() == [(1, "settled")]


def test_a_repeat_after_a_restart_is_answered_from_disk(site: Site) -> None:
    """The agent was killed between settling and replying: the update is fetched, not trained again."""
    first = site.order(site.manifest())
    site.open()
    again = site.order(site.manifest())
    assert again.payload == first.payload
    assert site.trainer.calls == 1
    assert site.outcomes() == [(1, "settled")]


def _resized(spec: RunSpec) -> RunSpec:
    return RunSpec.from_dict({**spec.to_dict(), "lora": {"rank": 2, "alpha": 8.0, "targets": ["attention"]}})


def test_a_settled_round_cannot_be_asked_again_with_another_adapter(site: Site) -> None:
    """One (run, round) releases once; other inputs under its name are refused."""
    site.order(site.manifest())
    adapter = some_adapter()
    sealed = site.order(site.manifest(adapter=adapter), adapter)
    assert (sealed.status, body(sealed)["code"], sealed.payload) == ("refused", "bad-manifest", b"")
    changed = site.order(site.manifest(2, spec=_resized(site.manifest().spec)))
    assert "earlier rounds" in body(changed)["message"]
    assert site.outcomes() == [(1, "settled")]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other site": ({"site": "hospital-002"}, "for site hospital-002"),
    "expired": ({"expires_at": time.time() - 1}, "expired"),
    "from the future": ({"issued_at": time.time() + 3600}, "future"),
    "other adapter": ({"adapter_digest": "sha256:" + "0" * 64}, "adapter"),
    "round beyond the run": ({"round": 4}, "3 rounds"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_manifest_is_refused_before_anything_is_reserved(site: Site, case: str) -> None:
    """Each wrong field is named in a signed refusal, and the ledger stays empty."""
    changes, message = WRONG[case]
    sealed = site.order(dataclasses.replace(site.manifest(), **changes))
    refusal = Refusal.from_dict(open_document(json.loads(sealed.document), site.key.public_hex))
    assert refusal.code == "bad-manifest"
    assert message in refusal.message
    assert (sealed.status, sealed.payload, site.trainer.calls, site.outcomes()) == ("refused", b"", 0, [])


def test_a_manifest_signed_by_another_key_is_refused(site: Site) -> None:
    """Only the pinned coordinator's signature counts."""
    sealed = site.order(site.manifest(), key=SigningKey.generate())
    assert body(sealed)["code"] == "bad-manifest"
    assert site.outcomes() == []


def test_a_tampered_manifest_is_refused(site: Site) -> None:
    """Any change after signing breaks the signature."""
    from fl_shared.identity.signing import sign_document

    document = sign_document(site.coordinator, site.manifest().to_dict())
    document["body"]["round"] = 2
    sealed = site.rounds.handle(json.dumps(document), lambda: b"")
    assert body(sealed)["code"] == "bad-manifest"
    assert site.outcomes() == []


def test_a_nonce_serves_one_round_only(site: Site) -> None:
    """A nonce seen for round 1 is refused for round 2, also after a restart."""
    site.order(site.manifest(1, nonce="n"))
    site.open()
    assert "nonce" in body(site.order(site.manifest(2, nonce="n")))["message"]


@pytest.mark.parametrize("name", ["records", "other"])
def test_what_is_computed_again_is_of_the_data_that_was_charged(site: Site, name: str) -> None:
    """A crash, then site.toml names other data, or other data under the same name: no update of it leaves uncharged."""

    def crash() -> None:
        raise Crash

    site.trainer.before = crash
    manifest = site.manifest()
    with pytest.raises(Crash):
        site.order(manifest)
    site.open()
    changed = site.ledger.register_dataset(name, "e" * 64, "record", 900, 1)
    site.ledger.set_budget(changed, 8.0, 1e-5, "officer")
    site.facts = dataclasses.replace(site.facts, dataset=changed)
    site.rounds = Rounds(site.facts, ledger=site.ledger, store=site.store, outgoing=site.outgoing, train=site.trainer)
    site.trainer.before = lambda: None
    assert body(site.order(manifest))["code"] == "failed"
    assert site.outcomes() == [(1, "in-doubt")]
    assert site.trainer.calls == 1
    assert site.order(site.manifest(2)).status == "ok"
    settled = [spend.reservation for spend in site.ledger.spends() if spend.outcome == "settled"]
    assert [(each.dataset, each.dataset_version) for each in settled] == [(name, changed.version)]


def _order(**changes: Any) -> bytes:
    whole = {
        "run": "demo-1", "round": 1, "nonce": "n", "spec_digest": "s", "adapter_digest": "a", "model_digest": MODEL,
        "ordered_at": 1.0, "update_digest": "u", "executed": None,
    }  # fmt: skip
    return json.dumps(whole | changes).encode()


DAMAGED = {
    "demo-1-1.json": [
        b"", b"[]", b"null", b"\xff\xfe", b"[" * 100_000, b"{}", _order(round="1"), _order(round=2),
        _order(round=1e400), _order(run=5), _order(run="demo-2"), _order(run=None), _order(nonce=["n"]),
        _order(ordered_at="x"),
        _order(update_digest=5), _order(executed=[]), _order(executed={"steps": 1}), _order(more=1),
    ],
    "evaluation_x.figures": [b"", b"[]", b"\xff", b"[" * 100_000, b"{}", b'{"mechanism": {}}', b'{"mechanism": []}'],
    "head.json": [
        b"", b"[]", b"\xff", b"[" * 100_000, b'{"entries": -5, "head": "x"}', b'{"entries": 1e400, "head": "x"}',
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_file_of_the_home_is_named_and_no_release_is_invented(site: Site, name: str) -> None:
    """What a failing disk may leave: the start is refused and names the file; nothing passes for a forgotten spend."""
    site.order(site.manifest())
    whole = (site.root / "releases" / "demo-1-1.json").read_bytes()
    path = site.root / name if name == "head.json" else site.root / "releases" / name
    for content in DAMAGED[name]:
        path.write_bytes(content)
        with pytest.raises((DataError, LedgerError), match=rf"{path.name} is damaged"):
            require_newest(site.ledger, LedgerHead(site.root / "head.json"), site.store)
    path.unlink()
    (site.root / "releases" / "demo-1-1.json").write_bytes(whole)
    require_newest(site.ledger, LedgerHead(site.root / "head.json"), site.store)


def test_another_base_model_is_refused_by_name(site: Site) -> None:
    """The refusal tells both digests."""
    sealed = site.order(site.manifest(spec=site_spec(base_model="sha256:" + "2" * 64)))
    assert body(sealed)["code"] == "unknown-base-model"
    assert MODEL in body(sealed)["message"]


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("noise_multiplier", 0.6, "noise_multiplier 0.6 < 0.8"),
        ("clipping_norm", 2.0, "clipping_norm 2 > 1"),
        ("sampling_probability", 0.5, "sampling_probability 0.5 > 0.2"),
        ("steps_per_round", 21, "steps_per_round 21 > 20"),
    ],
)
def test_policy_has_the_last_word(site: Site, field: str, value: float, message: str) -> None:
    """A proposal beyond the policy is refused with the value and the limit; nothing is reserved."""
    proposal: Any = {field: value}
    sealed = site.order(site.manifest(spec=site_spec(**proposal)))
    assert (body(sealed)["code"], body(sealed)["message"]) == ("policy", message)
    assert site.outcomes() == []


def test_a_target_outside_the_policy_is_refused(tmp_path: Path) -> None:
    """[policy] targets limits which layers a run may adapt."""
    site = Site(tmp_path, policy=dataclasses.replace(POLICY, targets=("shared_experts",)))
    assert "attention" in body(site.order(site.manifest()))["message"]


def test_a_round_over_budget_is_refused_and_the_ceiling_holds(tmp_path: Path) -> None:
    """Rounds are granted until the next one would pass the ceiling; then the answer is typed."""
    site = Site(tmp_path, epsilon=5.0)
    spec = site_spec(rounds=100)
    for number in range(1, 101):
        sealed = site.order(site.manifest(number, spec=spec))
        if sealed.status != "ok":
            break
    assert body(sealed)["code"] == "budget-exhausted"
    assert 1 <= site.trainer.calls < 100
    assert site.ledger.epsilon("records").spent <= 5.0


def _fails() -> None:
    raise ValueError("a private value: patient 4711")


def test_a_failure_in_training_is_charged_in_full_and_says_nothing_private(site: Site) -> None:
    """The reply is `failed` with a fixed message; a repeat is not tried again and costs nothing more."""
    site.trainer.before = _fails
    sealed = site.order(site.manifest())
    assert (sealed.status, body(sealed)["code"]) == ("failed", "failed")
    assert "4711" not in sealed.document
    assert site.outcomes() == [(1, "in-doubt")]
    charged = site.ledger.epsilon("records").spent
    site.trainer.before = lambda: None
    assert body(site.order(site.manifest()))["code"] == "suspended"
    assert site.trainer.calls == 1
    assert site.ledger.epsilon("records").spent == charged > 0


def test_an_update_with_nan_never_leaves(site: Site) -> None:
    """The engine handed back NaN: charged, failed, not sent."""
    bad = {"w": np.full((4, 3), np.nan, np.float32)}
    site.trainer.change = lambda trained: Trained(bad, trained.executed)
    sealed = site.order(site.manifest())
    assert (sealed.status, sealed.payload) == ("failed", b"")
    assert site.outcomes() == [(1, "in-doubt")]


def test_a_crash_in_training_resumes_under_the_same_reservation(site: Site) -> None:
    """Nothing can have left, so the repeat computes again and the round is charged once."""

    def crash() -> None:
        raise Crash

    site.trainer.before = crash
    with pytest.raises(Crash):
        site.order(site.manifest())
    site.trainer.before = lambda: None
    site.open()
    assert site.outcomes() == [(1, "open")]
    assert site.order(site.manifest()).status == "ok"
    assert site.outcomes() == [(1, "settled")]


def test_a_crash_in_training_is_charged_when_the_run_moves_on(site: Site) -> None:
    """The held reservation of round 1 ends in doubt, charged in full, when round 2 is ordered."""

    def crash() -> None:
        raise Crash

    site.trainer.before = crash
    with pytest.raises(Crash):
        site.order(site.manifest(1))
    site.trainer.before = lambda: None
    site.open()
    assert site.order(site.manifest(2)).status == "ok"
    assert site.outcomes() == [(1, "in-doubt"), (2, "settled")]
    assert site.order(site.manifest(1)).status == "failed"


def test_an_old_open_reservation_is_charged_at_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a day nobody will ask again: the reservation is charged in full."""

    def crash() -> None:
        raise Crash

    site.trainer.before = crash
    with pytest.raises(Crash):
        site.order(site.manifest(1))
    later = time.time() + 90_000
    monkeypatch.setattr(time, "time", lambda: later)
    site.open()
    assert site.outcomes() == [(1, "in-doubt")]


def test_a_crash_between_writing_and_settling_settles_at_start(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """The update is on disk and paid for, so it is settled, and a repeat fetches it."""

    def crash(*_: object) -> None:
        raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(site.ledger, "settle", crash)
        with pytest.raises(Crash):
            site.order(site.manifest())
    site.open()
    assert site.outcomes() == [(1, "settled")]
    assert site.order(site.manifest()).status == "ok"
    assert site.trainer.calls == 1


def test_an_altered_stored_update_is_kept_back(site: Site) -> None:
    """Bytes that no longer have the settled digest are not sent."""
    site.order(site.manifest())
    (path,) = (site.root / "releases").glob("*.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"\x00")
    sealed = site.order(site.manifest())
    assert (sealed.status, sealed.payload) == ("failed", b"")


def test_the_choke_point_demands_an_entry_that_settled_these_bytes(site: Site) -> None:
    """No entry, another entry, another round, other bytes: nothing is sealed."""
    sealed = site.order(site.manifest())
    receipt = Receipt.from_dict(body(sealed))
    other = pack({"w": np.zeros((1, 1), np.float32)})
    reservation = site.ledger.reserve("records", receipt.mechanism, run="demo-1", round=2, purpose="training")
    unsettled = site.ledger.entry(reservation.seq).id
    head = site.ledger.entry(1).id
    cases = [
        ("", receipt, sealed.payload),
        ("nonsense", receipt, sealed.payload),
        ("999:ab", dataclasses.replace(receipt, entry_id="999:ab"), sealed.payload),
        (head, dataclasses.replace(receipt, entry_id=head), sealed.payload),
        (unsettled, dataclasses.replace(receipt, entry_id=unsettled), sealed.payload),
        (receipt.entry_id, receipt, other),
        (receipt.entry_id, dataclasses.replace(receipt, update_digest=digest(other)), other),
        (receipt.entry_id, dataclasses.replace(receipt, round=2), sealed.payload),
        (receipt.entry_id, dataclasses.replace(receipt, run="other"), sealed.payload),
    ]
    for entry_id, claimed, payload in cases:
        with pytest.raises(LedgerError):
            site.outgoing.release(entry_id, claimed, payload)
    assert site.outgoing.release(receipt.entry_id, receipt, sealed.payload).status == "ok"


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"body": {}}', '{"body": {"run": "../x", "round": 1}}', "nul"])
def test_an_order_that_names_no_run_is_answered_with_an_error(site: Site, text: str) -> None:
    """There is nothing to sign a refusal about; nothing is reserved."""
    with pytest.raises(RunError):
        site.rounds.handle(text, lambda: b"")
    assert site.outcomes() == []


def test_stopping_breaks_off_a_round_and_the_next_start_resumes_it(site: Site) -> None:
    """After the grace the round ends without an answer; started again, it is computed and charged once."""
    entered = threading.Event()

    def wait() -> None:
        entered.set()
        while not site.rounds._stopping.is_set():
            time.sleep(0.01)

    site.trainer.before = wait
    failures: list[Exception] = []

    def ask() -> None:
        try:
            site.order(site.manifest(1))
        except Stopping as error:
            failures.append(error)

    worker = threading.Thread(target=ask)
    worker.start()
    assert entered.wait(30)
    assert not site.rounds.drain(0.05)
    site.rounds.break_off()
    worker.join(30)
    assert len(failures) == 1
    with pytest.raises(Stopping):
        site.order(site.manifest(2))
    assert site.outcomes() == [(1, "open")]
    site.trainer.before = lambda: None
    site.open()
    assert site.order(site.manifest(1)).status == "ok"
    assert site.outcomes() == [(1, "settled")]


def test_a_round_that_is_stopped_before_it_read_a_record_costs_nothing(site: Site) -> None:
    """Asked to end while it prepares a round, the agent gives the reservation back; the round is done after a start."""
    site.rounds._prepare = lambda spec, offset: assert_not(site.rounds.drain(0.0))
    manifest = site.manifest(1)
    with pytest.raises(Stopping):
        site.order(manifest)
    assert site.trainer.calls == 0
    assert site.outcomes() == [(1, "released")]
    position = site.ledger.epsilon("records")
    assert (position.spent, position.reserved) == (0.0, 0.0)
    site.open()
    assert site.order(manifest).status == "ok"
    assert site.outcomes() == [(1, "released"), (1, "settled")]


def assert_not(value: bool) -> None:
    """It is False."""
    assert not value


def test_orders_of_two_runs_take_turns_and_one_that_expires_in_line_costs_nothing(site: Site) -> None:
    """While one run's round trains, another run's order waits unread; reached too late, it is refused unpaid."""
    entered, go_on = threading.Event(), threading.Event()
    answers: dict[str, Any] = {}

    def train_slowly() -> None:
        entered.set()
        assert go_on.wait(30)

    site.trainer.before = train_slowly
    first = threading.Thread(target=lambda: answers.update(first=site.order(site.manifest())))
    first.start()
    assert entered.wait(30)
    others = {
        "second": site.manifest(run="other-1"),
        "expired": site.manifest(run="third-1", expires_at=time.time() + 0.2),
    }
    waiting = [
        threading.Thread(target=lambda name=name, order=order: answers.update({name: site.order(order)}))
        for name, order in others.items()
    ]
    for each in waiting:
        each.start()
    time.sleep(0.5)  # long enough for the third order to expire
    assert (site.trainer.calls, answers, site.outcomes()) == (1, {}, [(1, "open")])
    go_on.set()
    for each in (first, *waiting):
        each.join(30)
    assert (answers["first"].status, answers["second"].status) == ("ok", "ok")
    assert (body(answers["expired"])["code"], answers["expired"].payload) == ("bad-manifest", b"")
    assert "expired" in body(answers["expired"])["message"]
    assert site.outcomes() == [(1, "settled"), (1, "settled")]


def test_old_rounds_are_pruned(site: Site) -> None:
    """What belongs to rounds that the run has left behind goes; a very late repeat is refused, not trained again."""
    for number in (1, 2, 3):
        assert site.order(site.manifest(number)).status == "ok"
    names = sorted(path.name for path in (site.root / "releases").iterdir())
    assert names == ["demo-1-2.json", "demo-1-2.safetensors", "demo-1-3.json", "demo-1-3.safetensors"]
    assert "too old" in body(site.order(site.manifest(1)))["message"]
    assert site.trainer.calls == 3


def test_the_site_is_named_in_every_answer(site: Site) -> None:
    """Receipts and refusals carry the site's own id, whatever the order claims."""
    assert body(site.order(site.manifest()))["site"] == SITE
    assert body(site.order(site.manifest(2, site="hospital-002")))["site"] == SITE
