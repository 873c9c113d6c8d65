"""Orders that name the spec by its digest: every check of the whole ones, and what a hostile spec beside them gets."""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import pytest

from fl_client.agent import orders
from fl_client.agent.alone import train_alone
from fl_client.agent.outgoing import Outgoing
from fl_client.agent.rounds import Rounds
from fl_client.agent.service import AgentService, serve
from fl_shared.adapters.safetensors import digest
from fl_shared.canonical import canonical_bytes, parse_json, sha256_hex
from fl_shared.documents.order import MAX_SPEC_BYTES, RoundOrder, read_spec
from fl_shared.documents.round import Receipt, Refusal
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import RunError
from fl_shared.identity.signing import SigningKey, open_document, sign_document
from fl_shared.names import ALONE
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import Chunk, RoundHeader
from helpers.sites import SITE, Site, body, site_spec, some_adapter

SPEC = site_spec()


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """A site with a budget of epsilon 8."""
    return Site(tmp_path)


def an_order(of: Site, number: int = 1, **changes: Any) -> RoundOrder:
    return of.by_digest(of.manifest(number), **changes)


def refused(site: Site, sealed: Any) -> str:
    """The message of a signed refusal that cost nothing."""
    refusal = Refusal.from_dict(open_document(json.loads(sealed.document), site.key.public_hex))
    assert (sealed.status, refusal.code, sealed.payload) == ("refused", "bad-manifest", b"")
    assert (site.trainer.calls, site.outcomes()) == (0, [])
    return refusal.message


def test_a_round_by_digest_is_settled_and_its_receipt_names_order_and_spec(site: Site) -> None:
    """The receipt's digests are the order's and the spec's, as the coordinator holds them."""
    adapter = some_adapter()
    order = site.by_digest(site.manifest(adapter=adapter))
    sealed = site.order_by_digest(order, SPEC.canonical, adapter)
    receipt = Receipt.from_dict(open_document(json.loads(sealed.document), site.key.public_hex))
    assert (receipt.manifest_digest, receipt.spec_digest) == (order.digest, SPEC.digest)
    assert receipt.mechanism == SPEC.mechanism()
    assert site.outcomes() == [(1, "settled")]


def test_a_repeat_in_either_kind_gets_the_stored_bytes(site: Site) -> None:
    """A coordinator that was upgraded, or put back, in the middle of a round: the same round, paid once."""
    whole = site.order(site.manifest())
    short = site.order_by_digest(an_order(site), SPEC.canonical)
    again = site.order(site.manifest())
    assert whole.payload == short.payload == again.payload
    assert body(whole)["entry_id"] == body(short)["entry_id"] == body(again)["entry_id"]
    assert site.order_by_digest(an_order(site, 2), SPEC.canonical).status == "ok"
    assert site.outcomes() == [(1, "settled"), (2, "settled")]


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "other site": ({"site": "hospital-002"}, "for site hospital-002"),
    "expired": ({"expires_at": time.time() - 1}, "expired"),
    "from the future": ({"issued_at": time.time() + 3600}, "future"),
    "other adapter": ({"adapter_digest": "sha256:" + "0" * 64}, "adapter"),
    "round beyond the run": ({"round": 4}, "3 rounds"),
    "the site's own name space": ({"run": "alone:demo"}, "not the coordinator's"),
    "another spec": ({"spec_digest": "sha256:" + "0" * 64}, "not the one that the order names"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_order_is_refused_before_anything_is_reserved(site: Site, case: str) -> None:
    """Each wrong field is named in a signed refusal, and the ledger stays empty."""
    changes, message = WRONG[case]
    assert message in refused(site, site.order_by_digest(an_order(site, **changes), SPEC.canonical))


def test_key_nonce_and_the_run_s_one_spec_hold(site: Site) -> None:
    """A stranger's key; a spec without the site; a nonce again, and another spec in the run, after a restart."""
    assert "not the coordinator's" in refused(
        site, site.order_by_digest(an_order(site), SPEC.canonical, key=SigningKey.generate())
    )
    others = dataclasses.replace(SPEC, run=dataclasses.replace(SPEC.run, sites=("hospital-002",)))
    named = an_order(site, spec_digest=others.digest)
    assert "does not name this site" in refused(site, site.order_by_digest(named, others.canonical))
    assert site.order_by_digest(an_order(site, nonce="n"), SPEC.canonical).status == "ok"
    site.open()
    assert "nonce" in body(site.order_by_digest(an_order(site, 2, nonce="n"), SPEC.canonical))["message"]
    changed = dataclasses.replace(SPEC, lora=dataclasses.replace(SPEC.lora, rank=2))
    second = an_order(site, 2, spec_digest=changed.digest)
    assert "earlier rounds" in body(site.order_by_digest(second, changed.canonical))["message"]
    assert site.outcomes() == [(1, "settled")]


def named(text: str) -> str:
    return f"sha256:{sha256_hex(text.encode('utf-8', 'surrogatepass'))}"


CANON = SPEC.canonical
HOSTILE: dict[str, str] = {
    "nothing": "",
    "too large": " " * (MAX_SPEC_BYTES + 1),
    "spaces": json.dumps(json.loads(CANON), sort_keys=True),
    "another order of keys": json.dumps(dict(reversed(json.loads(CANON).items())), separators=(",", ":")),
    "a key twice": CANON[:-1] + ',"task":' + json.dumps(json.loads(CANON)["task"]) + "}",
    "a key twice inside": CANON.replace('"rank":4', '"rank":2,"rank":4'),
    "an unknown field": CANON[:-1] + ',"zone":1}',
    "no JSON": CANON[:-1],
    "two": CANON * 2,
    "NaN": CANON.replace('"clipping_norm":1.0', '"clipping_norm":NaN'),
    "nested": "[" * 100_000,
    "a number of many digits": "1" * 100_000,
    "a list": "[]",
    "a lone surrogate": CANON.replace('"a"', '"\\ud800"'),
    "a byte order mark": "\ufeff" + CANON,
    "a zero byte": CANON + "\0",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_spec_beside_a_rightly_signed_order_costs_nothing(site: Site, case: str) -> None:
    """The digest fits each of them: a refusal every time, and the right spec is trained afterwards."""
    text = HOSTILE[case]
    for _ in range(2):
        assert refused(site, site.order_by_digest(an_order(site, spec_digest=named(text)), text))
    assert site.order_by_digest(an_order(site), CANON).status == "ok"


def test_spec_bytes_that_change_between_orders_are_refused(site: Site) -> None:
    """Another spec under the digest of one that the site has read; and no spec once it has it."""
    assert site.order_by_digest(an_order(site), CANON).status == "ok"
    for text in (CANON.replace('"rank":4', '"rank":5'), CANON + " ", ""):
        assert body(site.order_by_digest(an_order(site, 2), text))["code"] == "bad-manifest"
    assert site.order_by_digest(an_order(site, 2), CANON).status == "ok"
    assert site.outcomes() == [(1, "settled"), (2, "settled")]


def test_a_spec_is_read_once_for_each_digest(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounds and repeats take it from memory; a spec with another digest is read by itself."""
    read_spec.cache_clear()
    for number in (1, 1, 2, 3):
        assert site.order_by_digest(an_order(site, number), CANON).status == "ok"
    assert (read_spec.cache_info().misses, read_spec.cache_info().hits) == (1, 3)


def test_an_order_is_parsed_and_verified_once_and_a_strangers_adapter_is_never_fetched(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of either kind. What waits in line has its key asked about again, which may have ended meanwhile."""
    counts = {"parse": 0, "open": 0, "fetch": 0, "key": 0}

    def counting(name: str, right: Any) -> Any:
        def call(*args: Any, **named: Any) -> Any:
            counts[name] += 1
            return right(*args, **named)

        return call

    monkeypatch.setattr(orders, "parse_json", counting("parse", parse_json))
    monkeypatch.setattr(orders, "open_document", counting("open", open_document))
    right = site.facts.accepts_key
    site.rounds._facts = dataclasses.replace(site.facts, accepts_key=counting("key", right))
    fetch = counting("fetch", bytes)
    for document, spec_json in ((an_order(site), CANON), (site.manifest(2), "")):
        text = json.dumps(sign_document(site.coordinator, document.to_dict()))
        assert site.rounds.handle(text, fetch, spec_json).status == "ok"
        assert counts == {"parse": 1, "open": 1, "fetch": 1, "key": 2}
        counts.update(dict.fromkeys(counts, 0))
    tampered = json.loads(text)
    tampered["body"]["round"] = 3
    stranger = sign_document(SigningKey.generate(), an_order(site, 3).to_dict())
    for wrong in (tampered, stranger):
        assert site.rounds.handle(json.dumps(wrong), fetch, CANON).status == "refused"
    assert counts["fetch"] == 0
    ended: list[bool] = []
    site.rounds._facts = dataclasses.replace(site.facts, accepts_key=lambda key: not ended and right(key))
    last = json.dumps(sign_document(site.coordinator, an_order(site, 3).to_dict()))
    assert site.rounds.handle(last, lambda: ended.append(True) or b"", CANON).status == "refused"  # type: ignore[func-returns-value]  # append
    assert site.outcomes() == [(1, "settled"), (2, "settled")]


@pytest.mark.parametrize(
    "text", ["", "{}", '{"body": {"run": "demo-1", "round": 1}, "body": {"run": "x", "round": 2}}', " " * (9 << 20)]
)
def test_an_order_that_is_read_in_two_ways_or_is_too_large_is_none(site: Site, text: str) -> None:
    """There is nothing to sign a refusal about."""
    with pytest.raises(RunError):
        site.rounds.handle(text, lambda: b"", CANON)
    assert site.outcomes() == []


@pytest.fixture
def stub(site: Site, tmp_path: Path) -> Iterator[agent_pb2_grpc.AgentStub]:
    """A caller on the agent's real socket."""
    server = serve(AgentService(SITE, site.rounds), tmp_path / "agent.sock")
    with grpc.insecure_channel(f"unix:{tmp_path / 'agent.sock'}") as channel:
        yield agent_pb2_grpc.AgentStub(channel)
    server.stop(0).wait()


def test_the_spec_comes_through_the_socket_and_one_of_megabytes_is_a_refusal(
    site: Site, stub: agent_pb2_grpc.AgentStub
) -> None:
    """In the header of `concordat.agent.v1`; what is larger than a spec may be is refused signed, unparsed."""

    def ask(order: RoundOrder, spec_json: str) -> str:
        header = RoundHeader(
            manifest_json=json.dumps(sign_document(site.coordinator, order.to_dict())),
            adapter_digest=digest(b""),
            spec_json=spec_json,
        )
        return str(next(stub.Round(iter([Chunk(header=header)]), timeout=60)).reply.status)

    large = "[" + "0," * (MAX_SPEC_BYTES // 2) + "0]"
    assert ask(an_order(site, spec_digest=named(large)), large) == "refused"
    assert ask(an_order(site), "") == "refused"
    assert site.outcomes() == []
    assert ask(an_order(site), CANON) == "ok"


def test_a_spec_of_ten_thousand_sites_is_read(site: Site) -> None:
    """As many as a spec may name, with the longest names: well below the limit."""
    table = site_spec().to_dict()
    table["run"]["sites"] = [SITE, *(f"{number:063}" for number in range(9_999))]
    spec = RunSpec.from_dict(table)
    assert len(spec.canonical) < MAX_SPEC_BYTES / 2
    assert canonical_bytes(spec.to_dict()).decode() == spec.canonical
    assert site.order_by_digest(an_order(site, spec_digest=spec.digest), spec.canonical).status == "ok"


@pytest.mark.parametrize("sites", [[SITE, "hospital-002"], ["hospital-002"]])
def test_a_site_that_trains_alone_orders_its_rounds_the_same_way(site: Site, tmp_path: Path, sites: list[str]) -> None:
    """Named by the spec or not: every round is settled in the site's own name space, and a repeat spends nothing."""
    table = site_spec().to_dict()
    table["run"]["sites"] = sites
    outgoing = Outgoing(site.key, site.ledger, ALONE)
    facts = dataclasses.replace(site.facts, namespace=ALONE)
    rounds = Rounds(facts, ledger=site.ledger, store=site.store, outgoing=outgoing, train=site.trainer)
    data = SimpleNamespace(labels=["a", "b"], texts=["x", "y"])
    opened: Any = SimpleNamespace(data=data, config=SimpleNamespace(site=SITE), rounds=rounds)
    said = [
        train_alone(opened, RunSpec.from_dict(table), site.coordinator, tmp_path / "out", lambda _text: None)
        for _ in range(2)
    ]
    assert (said[0]["run"], said[0]["rounds"]) == ("alone:demo", 3)
    assert said[0]["epsilon_spent_total"] == said[1]["epsilon_spent_total"] > 0
    assert (site.trainer.calls, site.outcomes()) == (3, [(1, "settled"), (2, "settled"), (3, "settled")])
