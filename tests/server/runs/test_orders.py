"""Orders in SQL, on SQLite and on PostgreSQL: what is signed for whom, what is stored of it, what a receipt needs."""

from __future__ import annotations

import dataclasses
import json
import time
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from alembic import command
from alembic.config import Config

from fl_server.db.models import ManifestRow, RunRow, SiteRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.sites import Sites
from fl_server.rounds.round import Round, RunContext
from fl_server.rounds.stragglers import Stragglers
from fl_server.runs.commits import Commits
from fl_server.runs.events import Events
from fl_server.runs.orders import Issued, Orders
from fl_server.runs.service import Runs
from fl_shared.adapters.safetensors import digest
from fl_shared.documents.base_model import BaseModel
from fl_shared.documents.order import BY_DIGEST, RoundOrder, read_spec
from fl_shared.documents.round import RoundManifest
from fl_shared.documents.spec import LORA_TARGETS
from fl_shared.identity.signing import SigningKey, open_document, sign_document
from helpers.benchmarks import load_benchmark
from helpers.specs import run_spec

SITES = ("h-1", "h-2", "h-3")
SPEC = run_spec(sites=SITES)
BASE = BaseModel(SPEC.run.base_model, LORA_TARGETS)
ADAPTER = digest(b"")


@pytest.fixture
def orders(store: Store, tmp_path: Path) -> Orders:
    """A coordinator with a run of three enrolled sites."""
    with store.write() as session:
        for site in SITES:
            session.add(SiteRow(site=site, state="enrolled", invited_at=1.0))
    Runs(store).launch(SPEC)
    return Orders(store)


def opened(issued: Issued, key: SigningKey) -> RoundOrder | RoundManifest:
    body = open_document(json.loads(issued.document), key.public_hex)
    return RoundOrder.from_dict(body) if issued.spec_json else RoundManifest.from_dict(body)


@pytest.mark.parametrize("reads", [0, BY_DIGEST])
def test_an_order_counts_for_its_own_round_site_and_adapter_only(orders: Orders, reads: int) -> None:
    """What was signed opens with the coordinator's key; `issued` knows it for nothing else."""
    key = SigningKey.generate()
    (issued,) = orders.issue(SPEC, 1, {"h-1": reads}, ADAPTER, key, 60.0).values()
    order = opened(issued, key)
    assert (order.digest, order.site, order.round) == (issued.digest, "h-1", 1)
    assert (order.run, order.adapter_digest, order.spec_digest) == ("demo", ADAPTER, SPEC.digest)
    assert order.expires_at - order.issued_at == pytest.approx(60.0)
    assert orders.issued(issued.digest, "demo", 1, "h-1", ADAPTER)
    assert not orders.issued(issued.digest, "demo", 2, "h-1", ADAPTER)
    assert not orders.issued(issued.digest, "demo", 1, "h-2", ADAPTER)
    assert not orders.issued(issued.digest, "demo", 1, "h-1", digest(b"x"))
    assert not orders.issued("sha256:" + "0" * 64, "demo", 1, "h-1", ADAPTER)
    (again,) = orders.issue(SPEC, 1, {"h-1": reads}, ADAPTER, key, 60.0).values()
    assert again.digest != issued.digest


def test_each_site_gets_the_order_that_it_reads(orders: Orders) -> None:
    """Nothing announced and the version before: the spec inside. A later kind than ours: by digest, as for ours."""
    key = SigningKey.generate()
    issued = orders.issue(SPEC, 1, {"h-1": 0, "h-2": BY_DIGEST, "h-3": BY_DIGEST + 1}, ADAPTER, key, 60.0)
    assert [type(opened(issued[site], key)) for site in SITES] == [RoundManifest, RoundOrder, RoundOrder]
    assert [each.spec_json for each in issued.values()] == ["", SPEC.canonical, SPEC.canonical]
    assert read_spec(issued["h-2"].spec_json, opened(issued["h-2"], key).spec_digest) == SPEC
    assert "h-3" not in issued["h-2"].document


def test_the_document_of_an_order_by_digest_is_made_again_from_its_row(store: Store, orders: Orders) -> None:
    """It is not stored; row, run and key give it, signature included, byte for byte."""
    key = SigningKey.generate()
    (issued,) = orders.issue(SPEC, 2, {"h-1": BY_DIGEST}, ADAPTER, key, 60.0).values()
    with store.read() as session:
        row = session.get_one(ManifestRow, issued.digest)
        spec_digest = session.get_one(RunRow, "demo").spec_digest
    assert row.document_json == ""
    again = RoundOrder(
        row.run, row.round, row.site, spec_digest, row.adapter_digest, row.nonce, row.issued_at, row.expires_at
    )
    assert json.dumps(sign_document(key, again.to_dict()), sort_keys=True) == issued.document


def test_a_thousand_orders_are_few_bytes_and_do_not_hold_the_spec() -> None:
    """The benchmark's bar of 1 MB of SQL a round; an order is no larger when the run has more sites."""
    benchmark = load_benchmark("orders")
    found, fewer = benchmark.measure(1000), benchmark.measure(20)
    assert found["sql_bytes_per_round"] <= 1_000_000
    assert found["order_bytes"] == fewer["order_bytes"] < 1000
    assert found["whole"]["order_bytes"] > 10 * fewer["whole"]["order_bytes"]


def _at(store: Store, revision: str) -> None:
    config = Config()
    config.set_main_option("script_location", str(resources.files("fl_server.db") / "migrations"))
    config.attributes["configure_logger"] = False
    with store._engine.begin() as connection:
        config.attributes["connection"] = connection
        (command.downgrade if revision == "0005" else command.upgrade)(config, revision)


def test_what_the_version_before_has_issued_is_still_answered(store: Store, orders: Orders) -> None:
    """A database of 0005 with a manifest in it: after the migration its receipt is accepted, and nobody reads 2."""
    key = SigningKey.generate()
    Sites(store).announce("h-1", BASE, BY_DIGEST)
    manifest = RoundManifest("demo", 1, "h-1", SPEC, ADAPTER, "n" * 32, 1.0, 2.0)
    text = json.dumps(sign_document(key, manifest.to_dict()), sort_keys=True)
    _at(store, "0005")
    with store.write() as session:
        session.execute(
            sa.text("INSERT INTO manifests VALUES (:digest, 'demo', 1, 'h-1', :adapter, :text, 1.0, 2.0)"),
            {"digest": manifest.digest, "adapter": ADAPTER, "text": text},
        )
    store.migrate()
    assert orders.issued(manifest.digest, "demo", 1, "h-1", ADAPTER)
    with store.read() as session:
        row = session.get_one(ManifestRow, manifest.digest)
    assert (row.document_json, row.nonce) == (text, "")
    assert [row.orders for row in Sites(store).all()] == [0, 0, 0]


def test_an_announcement_says_which_orders_are_read_and_the_newest_is_valid(store: Store, orders: Orders) -> None:
    """An agent that was put back to the version before says nothing, which is 0."""
    sites = Sites(store)
    assert sites.get("h-1").orders == 0
    sites.announce("h-1", BASE, BY_DIGEST)
    assert (sites.get("h-1").orders, sites.get("h-2").orders) == (BY_DIGEST, 0)
    sites.announce("h-1", BASE)
    assert sites.get("h-1").orders == 0


class Nobody:
    """A grid without nodes."""

    def get_node_ids(self) -> list[int]:
        return []

    def pull_messages(self, _ids: Any) -> list[Any]:
        return []


def test_a_site_that_goes_back_a_version_before_it_is_asked_gets_the_order_that_it_reads(
    store: Store, orders: Orders, tmp_path: Path
) -> None:
    """In the round that is under way; one that was asked already keeps its order, whose answer is on its way."""
    sites, key = Sites(store), SigningKey.generate()
    home = ServerHome(tmp_path)
    commits = Commits.of(home, store)
    for site in SITES:
        sites.announce(site, BASE, BY_DIGEST)
    grid: Any = Nobody()
    late = Stragglers(commits, "demo", grid)
    context = RunContext("a", commits, Events(store), orders, sites, grid, late, home.scratch)
    made = Round(context, dataclasses.replace(SPEC), key=key, number=1, base=b"")
    first, second, third = made._asked
    before = [each.order for each in made._asked]
    second.message = "under way"
    sites.announce("h-1", BASE)
    sites.announce("h-2", BASE)
    made._refresh_sites()
    assert isinstance(opened(first.order, key), RoundManifest)
    assert orders.issued(first.order.digest, "demo", 1, "h-1", ADAPTER)
    assert [second.order, third.order] == before[1:]
    again = first.order
    made._refresh_sites()
    assert first.order is again
    with store.read() as session:
        assert session.scalar(sa.select(sa.func.count()).select_from(ManifestRow)) == 4
    assert time.time() < opened(again, key).expires_at
