"""Flower's copy of the list of sites is lost, damaged or stale, and no site is locked out; revoked keys stay out."""

from __future__ import annotations

import json
import os
import shutil
import sqlite3
import tempfile
from base64 import b64encode
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.node_pb2 import Node
from flwr.supercore.date import now as flower_now
from flwr.supercore.primitives.asymmetric import public_key_to_bytes, sign_message

from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.flower.superlink import Flower
from fl_server.home.layout import ServerHome
from fl_server.identity.sites import Sites
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from helpers.coordinators import Coordinator, Keys, until

A, B = "hospital-001", "hospital-002"

pytestmark = pytest.mark.timeout(300)


@pytest.fixture(scope="module")
def one() -> Iterator[Coordinator]:
    """A coordinator with two enrolled sites."""
    root = Path(tempfile.mkdtemp(prefix="no-"))
    made = None
    try:
        made = Coordinator(root)
        made.up()
        made.enrol(A, B)
        yield made
    finally:
        if made is not None:
            made.close()
        shutil.rmtree(root, ignore_errors=True)


def signed_by(key: ec.EllipticCurvePrivateKey) -> dict[str, str]:
    """The headers of Flower's SuperNode with this node key."""
    timestamp = flower_now().isoformat()
    return {
        "content-type": "application/protobuf",
        "flwr-public-key": b64encode(public_key_to_bytes(key.public_key())).decode(),
        "flwr-timestamp": timestamp,
        "flwr-signature": b64encode(sign_message(key, timestamp.encode())).decode(),
    }


def activate(one: Coordinator, site: str) -> int:
    """Come on line as the site's SuperNode does, through the gateway; the node's id, 0 when it is refused."""
    key = one.keys[site].node
    body = ActivateNodeRequest(public_key=public_key_to_bytes(key.public_key()), heartbeat_interval=30.0)
    with one.client(site) as client:
        answer = client.post("/v1/fleet/activate-node", content=body.SerializeToString(), headers=signed_by(key))
    return ActivateNodeResponse.FromString(answer.content).node_id if answer.status_code == 200 else 0


def beat(one: Coordinator, site: str, node: int) -> int:
    """A sign of life of that node; the status."""
    body = SendNodeHeartbeatRequest(node=Node(node_id=node), heartbeat_interval=30.0).SerializeToString()
    with one.client(site) as client:
        return client.post(
            "/v1/fleet/send-node-heartbeat", content=body, headers=signed_by(one.keys[site].node)
        ).status_code


def leave(one: Coordinator, site: str, node: int) -> int:
    """Go off line as a SuperNode does that is stopped; the status."""
    body = DeactivateNodeRequest(node_id=node).SerializeToString()
    with one.client(site) as client:
        return client.post(
            "/v1/fleet/deactivate-node", content=body, headers=signed_by(one.keys[site].node)
        ).status_code


def gets_through(one: Coordinator, site: str) -> int:
    """Wait until the site's node is let on line; its id."""
    nodes: list[int] = []

    def tried() -> bool:
        nodes.append(activate(one, site))
        return bool(nodes[-1])

    until(tried, f"the node of {site} is accepted")
    return nodes[-1]


def known(one: Coordinator, site: str) -> SiteRow:
    """What the coordinator has stored of a site."""
    return Sites(Store(f"sqlite:///{one.home / 'coordinator.sqlite'}")).get(site)


def go_off_line(one: Coordinator, site: str) -> None:
    """Take the site's node off line: one that is on line already is not let on line again for a minute."""
    until(lambda: leave(one, site, int(known(one, site).node_id)) == 200, f"the node of {site} leaves")


def online(one: Coordinator) -> dict[str, bool]:
    """What `fl-admin sites list` says."""
    return {each["site"]: each["online"] for each in one.admin("sites", "list")["sites"]}


def test_online_is_who_flower_lets_through(one: Coordinator) -> None:
    """A site whose agent speaks and whose node is refused is not online; with a node that beats it is."""
    with one.client(B) as client:
        assert client.get("/v1/hello").status_code == 200
    node = activate(one, A)
    assert node
    assert beat(one, A, node) == 200
    shown = online(one)
    assert (shown[A], shown[B]) == (True, False)
    assert beat(one, A, node ^ 1) == 401
    assert online(one)[A] is False


def test_a_node_that_leaves_is_not_online_at_once_as_in_flowers_grid(one: Coordinator) -> None:
    """A SuperNode that is stopped says so: the admin need not wait for silence, and a new start is seen at once."""
    go_off_line(one, A)
    node = gets_through(one, A)
    until(lambda: online(one)[A], "the node is online", 30.0)
    assert leave(one, A, node) == 200
    row = known(one, A)
    assert Flower(ServerHome(one.home)).nodes()[row.node_id] == "offline"
    assert online(one)[A] is False
    assert activate(one, A) == node
    assert online(one)[A] is True


def test_an_answer_that_cannot_be_noted_is_passed_on_and_noted_later(one: Coordinator) -> None:
    """The database refuses the note alone: what the SuperLink answered, an order it may be, reaches the site, and the
    log blames the right one of the two; with the next call after it the note is made up for.
    """
    site = "hospital-noted"
    one.enrol(site)
    until(lambda: bool(activate(one, site)), "the new node is accepted", 30.0)
    other = "hospital-unnoted"
    one.enrol(other)
    log = one.home / "logs" / "gateway.log"
    said = log.read_text()
    with closing(sqlite3.connect(one.home / "coordinator.sqlite", timeout=30)) as database:
        database.execute("CREATE TRIGGER away BEFORE UPDATE OF node_seen_at ON sites BEGIN DELETE FROM nowhere; END")
        database.commit()
        node = activate(one, other)
        assert node
        assert beat(one, other, node) == 200
        assert beat(one, other, node ^ 1) == 401
        database.execute("DROP TRIGGER away")
        database.commit()
    fresh = log.read_text().removeprefix(said)
    assert "cannot note" in fresh
    assert "the SuperLink cannot be reached" not in fresh
    assert online(one)[other] is False
    assert beat(one, other, node) == 200
    assert online(one)[other] is True


def lost(database: Path) -> None:
    """The file and what belongs to it are gone."""
    for each in database.parent.glob("superlink.db*"):
        each.unlink()


def nonsense(database: Path) -> None:
    """Other bytes stand there."""
    lost(database)
    database.write_bytes(os.urandom(65_536))


def cut_off(database: Path) -> None:
    """The second half was never written."""
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    os.truncate(database, database.stat().st_size // 2 + 100)


def torn_page(database: Path) -> None:
    """A page in the middle holds nonsense."""
    with closing(sqlite3.connect(database)) as opened:
        opened.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (page,) = opened.execute("SELECT rootpage FROM sqlite_master WHERE name = 'node'").fetchone()
        (size,) = opened.execute("PRAGMA page_size").fetchone()
    with database.open("r+b") as target:
        target.seek((page - 1) * size)
        target.write(b"\x5a" * size)


def no_nodes(database: Path) -> None:
    """A table is missing."""
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("DROP TABLE node")


def emptied(database: Path) -> None:
    """Every node is gone, the rest is as it was."""
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("DELETE FROM node")


def forbidden(database: Path) -> None:
    """The nodes were forbidden by somebody else's `flwr supernode unregister`."""
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("UPDATE node SET status = 'unregistered'")


def another_version(database: Path) -> None:
    """SQLite finds nothing wrong, and the SuperLink does not start with it."""
    with closing(sqlite3.connect(database)) as opened, opened:
        opened.execute("UPDATE alembic_version SET version_num = 'ffffffffffff'")


DAMAGE = [lost, nonsense, cut_off, torn_page, forbidden, another_version]


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda each: each.__name__)
def test_a_lost_or_damaged_superlink_database_locks_nobody_out(one: Coordinator, damage: object) -> None:
    """Damaged while the coordinator is down: after its start both sites' nodes get through, with their old keys."""
    one.down()
    assert callable(damage)
    damage(one.home / "flower" / "superlink.db")
    one.up()
    assert gets_through(one, B)
    node = gets_through(one, A)
    assert beat(one, A, node) == 200
    row = known(one, A)
    assert row.node_id == str(node)
    found = online(one)  # among sites of other tests
    assert (found[A], found[B]) == (True, True)


def test_a_link_to_nowhere_is_set_aside(tmp_path: Path) -> None:
    """SQLite makes no file through it; the next start makes one in its place."""
    home = ServerHome(tmp_path)
    home.flower.mkdir()
    database = home.flower / "superlink.db"
    database.symlink_to("/nowhere/superlink.db")
    flower = Flower(home)
    assert flower.damaged()
    assert flower.set_aside()
    assert not database.is_symlink()
    assert not flower.damaged()


@pytest.mark.parametrize("damage", [no_nodes, emptied], ids=lambda each: each.__name__)
def test_damage_under_a_running_superlink_is_noticed_and_repaired(one: Coordinator, damage: object) -> None:
    """The next refused call sets it off; nobody has to restart anything, and until then the site is not online."""
    go_off_line(one, A)
    node = gets_through(one, A)
    assert callable(damage)
    damage(one.home / "flower" / "superlink.db")
    until(lambda: beat(one, A, node) != 200, "the damage shows", 60.0)
    assert online(one)[A] is False
    assert gets_through(one, A)
    assert online(one)[A] is True


def test_a_revoked_sites_keys_are_never_accepted_again(one: Coordinator) -> None:
    """Its node key and its TLS key, from itself with a new token and from another; the ledger's key stays its own."""
    site = "hospital-out"
    old = Keys(site, one.root / site)
    with one.client() as client:

        def ask(keys: Keys, name: str = site) -> tuple[int, str]:
            body = keys.request(one.invite(name)) | {"site": name}
            answer = client.post("/v1/enroll", json=body)
            return answer.status_code, str(answer.json().get("code", ""))

        assert ask(old) == (200, "")
        assert ask(old) == (200, "")  # an answer that was lost: the same keys again
        one.admin("sites", "revoke", site)
        assert ask(old) == (403, "key-revoked")
        fresh = Keys(site, one.root / site, signing=old.signing)
        # Each in the other's place: the same keys.
        assert ask(Keys(site, one.root / site, signing=old.signing, node=old.tls, tls=old.node)) == (403, "key-taken")
        assert ask(Keys(site, one.root / site, signing=old.signing, node=old.tls)) == (403, "key-taken")
        assert ask(Keys(site, one.root / site, signing=old.signing, tls=old.node)) == (403, "key-taken")
        for stale in (
            Keys(site, one.root / site, signing=old.signing, node=old.node),
            Keys(site, one.root / site, signing=old.signing, tls=old.tls),
        ):
            assert ask(stale) == (403, "key-revoked")
            assert ask(Keys(B, one.root / B, node=stale.node, tls=stale.tls), "hospital-new") == (403, "key-taken")
        assert ask(Keys(B, one.root / B, signing=old.signing), "hospital-new") == (403, "key-taken")
        assert ask(fresh) == (200, "")
        assert ask(old) == (403, "key-revoked")  # replaced keys are as revoked ones
        fresh.save(client.post("/v1/enroll", json=fresh.request(one.invite(site))).json()["certificate_pem"])
    with one.client(folder=fresh.folder) as client:
        renewal = client.post("/v1/renew", json={"csr_pem": old.request("")["csr_pem"]})
        assert (renewal.status_code, renewal.json()["code"]) == (403, "key-revoked")


SITE_TOML = """
[site]
id = "{site}"
[server]
url = "{url}"
[data]
name = "diagnoses"
path = "records.csv"
text_column = "text"
label_column = "label"
privacy_unit = "record"
max_records_per_unit = 1
[model]
directory = "tiny"
[policy]
min_noise_multiplier = 0.8
max_clipping_norm = 1.0
max_sampling_probability = 0.2
max_steps_per_round = 100
[budget]
epsilon = 8.0
delta = 1e-5
approver = "officer"
"""


def test_a_site_that_changed_its_key_is_known_by_the_new_one_once_it_has_enrolled_again(one: Coordinator) -> None:
    """The verbs of both sides: invite, enroll, keys rotate, invite, enroll --force. Before the last, the old key."""
    site, home = "hospital-rekeyed", one.root / "rekeyed"
    at = ("--site", site, "--home", str(home), "--json")

    def client(*words: str) -> dict[str, str]:
        answer: dict[str, str] = json.loads(one.run("fl-client", *words, *at).stdout)
        return answer

    old = client("enroll", "--server", one.url, "--token", one.invite(site))["signing_key"]
    (home / "site.toml").write_text(SITE_TOML.format(site=site, url=one.url))
    Ledger.open(f"sqlite:///{home}/ledger.sqlite", SigningKey.load(home / "keys" / "signing.pem"), site).close()
    new = client("keys", "rotate", "--by", "A. Officer", "--reason", "yearly")["new_key"]
    assert new != old
    assert one.admin("sites", "show", site)["signing_key"] == old
    assert client("enroll", "--server", one.url, "--token", one.invite(site), "--force")["signing_key"] == new
    assert one.admin("sites", "show", site)["signing_key"] == new


def test_a_key_is_enrolled_by_who_holds_it_and_serves_one_purpose(one: Coordinator) -> None:
    """Nobody can take another's key by naming it first, and the untrusted half's node key is no TLS key."""
    site, victim = "hospital-thief", Keys("hospital-victim", one.root / "victim")
    mine = Keys(site, one.root / site)
    public = victim.request("")
    with one.client() as client:

        def ask(body: dict[str, object]) -> tuple[int, str]:
            answer = client.post("/v1/enroll", json=body)
            return answer.status_code, str(answer.json().get("code", ""))

        token = one.invite(site)
        honest = mine.request(token)
        for name in ("signing_public_key", "node_public_key"):
            assert ask(honest | {name: public[name]}) == (403, "not-proved")
        for changed in (
            {"signing": "0" * 128}, {"node": "00"}, {"signing": honest["proofs"]["signing"].upper()},
            victim.request(token)["proofs"], mine.request(one.invite("hospital-other"))["proofs"],
        ):  # fmt: skip
            assert ask(honest | {"proofs": honest["proofs"] | changed}) == (403, "not-proved")
        wrong: tuple[object, ...] = ({}, {"signing": honest["proofs"]["signing"]}, [], None, "x")
        for lacking in wrong:
            assert ask(honest | {"proofs": lacking})[0] == 400
        assert ask(Keys(site, one.root / site, tls=mine.tls, node=mine.tls).request(token)) == (403, "key-taken")
        assert ask(honest) == (200, "")
        assert ask(victim.request(one.invite(victim.site))) == (200, "")
        mine.save(client.post("/v1/enroll", json=mine.request(one.invite(site))).json()["certificate_pem"])
    renewed = Keys(site, one.root / "unused", tls=mine.node).request("")
    with one.client(folder=mine.folder) as client:
        answer = client.post("/v1/renew", json={"csr_pem": renewed["csr_pem"]})
    assert (answer.status_code, answer.json()["code"]) == (403, "key-taken")


def test_an_enrolment_that_broke_off_after_flowers_registration_can_be_repeated(one: Coordinator) -> None:
    """Flower holds the key under an id that nobody knows: the site is enrolled, and gets through soon."""
    site = "hospital-again"
    keys = Keys(site, one.root / site)
    flower = Flower(ServerHome.open(one.home))
    assert flower.register_node(keys.request("")["node_public_key"], site)
    with one.client() as client:
        answer = client.post("/v1/enroll", json=keys.request(one.invite(site)))
    assert answer.status_code == 200, answer.text
    keys.save(answer.json()["certificate_pem"])
    one.keys[site] = keys
    assert gets_through(one, site)
