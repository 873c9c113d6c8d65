"""Whatever bytes come as a token, a key, a certificate request, a call or a piece of one: a value or our own error."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding
from flwr.app import ArrayRecord, ConfigRecord, RecordDict
from flwr.common import Array
from flwr.proto.fleet_pb2 import PushMessagesRequest
from flwr.proto.message_pb2 import Message, Metadata
from hypothesis import example, given
from hypothesis import strategies as st

from fl_client.identity.enrolment import Token
from fl_client.site.address import server_url
from fl_client.training.ranks import frames
from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.gateway import fleet
from fl_server.home.layout import ServerSettings
from fl_server.identity import authority as pki
from fl_server.identity.sites import Sites
from fl_server.rounds.replies import parts
from fl_shared.errors import ConcordatError
from fl_shared.identity.signing import SigningKey, ed25519_key, verify
from fl_shared.wire.chunks import join
from helpers.coordinators import Keys

SITE = "h-1"
ROW = b"\x93NUMPY\x01\x00v\x00{'descr': '|u1', 'fortran_order': False, 'shape': (3,), }" + b" " * 60 + b"\nabc"
PUSH = PushMessagesRequest(
    messages_list=[Message(metadata=Metadata(src_node_id=7, dst_node_id=1, reply_to_message_id="a" * 64))]
).SerializeToString()


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> pki.Authority:
    """A CA."""
    folder = tmp_path_factory.mktemp("ca")
    return pki.Authority.create(folder / "ca.key", folder / "ca.pem")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Keys:
    """A site's keys."""
    return Keys(SITE, tmp_path_factory.mktemp("keys"))


@pytest.fixture(scope="module")
def asked(keys: Keys) -> dict[str, str]:
    """Their enrolment; one for all, since a signature is another each time."""
    return keys.request("x")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Sites]:
    """A coordinator's sites, one of them invited."""
    store = Store(f"sqlite:///{tmp_path_factory.mktemp('db') / 'c.sqlite'}")
    store.migrate()
    yield Sites(store)
    store.close()


def latin(raw: bytes) -> str:
    """Any bytes as text."""
    return raw.decode("latin-1")


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """Bytes of which a few were changed, cut out or put in."""
    made = bytearray(data)
    for _ in range(draw(st.integers(1, 6))):
        place = draw(st.integers(0, max(0, len(made) - 1)))
        match draw(st.integers(0, 2)):
            case 0 if made:
                made[place] = draw(st.integers(0, 255))
            case 1:
                del made[place : place + draw(st.integers(1, 8))]
            case _:
                made[place:place] = draw(st.binary(max_size=8))
    return bytes(made)


@given(st.text(max_size=200) | damaged(b"ct1.h-1." + b"A" * 32 + b"." + b"a" * 64).map(latin))
@example("ct1.h-1." + "A" * 32 + "." + "a" * 64 + "\n")
@example("ct1.h-1." + "A" * 32 + "." + "\u0661" * 64)
def test_any_text_as_a_token(sites: Sites, authority: pki.Authority, keys: Keys, text: str) -> None:
    """At the site, and at the coordinator; nobody is ever enrolled by it."""
    with contextlib.suppress(ConcordatError):
        Token.parse(text)
    with contextlib.suppress(ConcordatError):
        server_url(text)
    sites.invite(SITE, ca_sha256=authority.sha256)
    asked = keys.request(text)
    with pytest.raises(ConcordatError):
        sites.enrol(
            site=SITE, token=text, csr_pem=asked["csr_pem"], signing_key=asked["signing_public_key"],
            node_key=asked["node_public_key"], proofs={}, authority=authority, flower=None, days=1.0,  # type: ignore[arg-type]
        )  # fmt: skip


@given(st.data())
def test_any_text_as_a_key_or_request(
    sites: Sites, authority: pki.Authority, keys: Keys, asked: dict[str, str], data: st.DataObject
) -> None:
    """The three keys of an enrolment, each damaged in its own form, PEM and DER."""
    der = base64.b64decode("".join(asked["csr_pem"].splitlines()[1:-1]))

    def pem(raw: bytes) -> str:
        text = base64.encodebytes(raw).decode()
        return f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"

    csr = data.draw(
        st.just(asked["csr_pem"]) | damaged(der).map(pem) | st.text(max_size=100)
        | damaged(asked["csr_pem"].encode()).map(latin)
    )  # fmt: skip
    with contextlib.suppress(ConcordatError):
        authority.sign_request(csr, "site", SITE, 1.0)
    blob = base64.b64decode(asked["node_public_key"].split()[1])
    node = data.draw(
        st.text(max_size=100) | damaged(asked["node_public_key"].encode()).map(latin)
        | damaged(blob).map(lambda raw: "ecdsa-sha2-nistp384 " + base64.b64encode(raw).decode())
    )  # fmt: skip
    signing = data.draw(st.text(max_size=70) | damaged(keys.signing.public_hex.encode()).map(latin))
    with pytest.raises(ConcordatError):
        sites.enrol(
            site=SITE, token="x", csr_pem=csr, signing_key=signing, node_key=node, proofs={}, authority=authority,
            flower=None, days=1.0,  # type: ignore[arg-type]
        )  # fmt: skip
    with contextlib.suppress(ConcordatError):
        ed25519_key(signing)
    with pytest.raises(ConcordatError):
        verify(signing, b"x", data.draw(st.text(max_size=130) | st.just("0" * 128)))


@given(st.data())
def test_any_bytes_as_a_certificate(authority: pki.Authority, data: st.DataObject) -> None:
    """Whose it is, or our own error; TLS has verified it, the subject may still be anything."""
    raw = data.draw(st.binary(max_size=100) | damaged(authority.certificate.public_bytes(Encoding.DER)))
    with contextlib.suppress(ConcordatError):
        pki.identity(raw)


@given(st.binary(max_size=200) | damaged(PUSH))
def test_any_bytes_as_a_push(raw: bytes) -> None:
    """The one Fleet call that the gateway reads."""
    with contextlib.suppress(ConcordatError):
        fleet.require_own_messages(raw, SiteRow(site=SITE, node_id="7"))


@given(st.binary(max_size=200) | damaged(ROW))
@example(b"\x93NUMPY\x03\x00\xff\xff\xff\xff")
@example(b"\x93NUMPY\x01\x00\x10\x00" + b"(" * 16)
@example(b"\x93NUMPY\x01\x00\x10\x00{'a':1e400,**{}}")
def test_any_bytes_as_a_reply_of_flower(raw: bytes) -> None:
    """A NumPy header is read by Python's own parser of literals."""
    array = Array(data=raw, dtype="uint8", shape=(len(raw),), stype="numpy.ndarray")
    content = RecordDict(
        {"arrays": ArrayRecord({"adapter": array}), "config": ConfigRecord({"status": "ok", "document": "{}"})}
    )
    with contextlib.suppress(ConcordatError):
        parts(content)


@given(st.lists(st.binary(max_size=20), max_size=6), st.integers(-5, 200), st.text(max_size=80), st.integers(0, 150))
def test_any_pieces(pieces: list[bytes], announced: int, digest: str, limit: int) -> None:
    """Joined only when they are what was announced."""
    whole = b"".join(pieces)
    for name in (digest, f"sha256:{hashlib.sha256(whole).hexdigest()}"):
        with contextlib.suppress(ConcordatError):
            assert join(iter(pieces), expected_bytes=announced, expected_digest=name, limit=limit) == whole


def frame(head: bytes, rest: bytes) -> bytes:
    """A frame of any head."""
    return struct.pack(">QQ", len(head), len(rest)) + head + rest


@given(st.binary(max_size=100) | st.builds(frame, st.binary(max_size=60), st.binary(max_size=9)))
@example(struct.pack(">QQ", 2, 0) + b"[]")
@example(struct.pack(">QQ", 3, 0) + b"{,}")
@example(struct.pack(">QQ", 1, 0) + b"\xff")
@example(struct.pack(">QQ", 90_000, 0) + b"[" * 90_000)
@example(struct.pack(">QQ", 1 << 35, 0) + b"{}")
def test_any_bytes_between_agent_and_ranks(raw: bytes) -> None:
    """A frame, the end of the stream, or our own error; no memory is taken for what was only announced."""
    ours, theirs = socket.socketpair()

    def speak() -> None:
        with contextlib.suppress(OSError):
            theirs.sendall(raw)
        theirs.close()

    speaking = threading.Thread(target=speak)
    speaking.start()
    with ours, contextlib.suppress(ConcordatError, EOFError):
        frames.receive(ours)
    speaking.join()


HEAD = b'[server]\nhost = "x.example"\ngateway_port = 9443\ncontrol_port = 9444\n[metrics]\nlisten = "127.0.0.1:'


@given(st.binary(max_size=200) | damaged(HEAD + b'9445"\n'))
@example(HEAD + "\u0662".encode() + b'"')
@example(HEAD + b"9" * 4000 + b'"')
def test_any_bytes_as_server_toml(tmp_path: Path, raw: bytes) -> None:
    """Settings, or the field that is wrong."""
    path = tmp_path / "server.toml"
    path.write_bytes(raw)
    with contextlib.suppress(ConcordatError):
        ServerSettings.load(path)


@given(st.binary(max_size=64), st.binary(max_size=64))
def test_a_signature_of_other_bytes_never_fits(payload: bytes, other: bytes) -> None:
    """The right key and a right signature, of something else."""
    key = SigningKey.generate()
    if payload != other:
        with pytest.raises(ConcordatError):
            verify(key.public_hex, other, key.sign(payload))


def test_versions_that_do_not_exist(authority: pki.Authority, asked: dict[str, str]) -> None:
    """Found by the long profile: the library has an exception of its own for these."""
    raw = bytearray(authority.certificate.public_bytes(Encoding.DER))
    place = raw.index(b"\xa0\x03\x02\x01\x02") + 4
    raw[place] = 1
    with pytest.raises(ConcordatError):
        pki.identity(bytes(raw))
    der = bytearray(base64.b64decode("".join(asked["csr_pem"].splitlines()[1:-1])))
    der[der.index(b"\x02\x01\x00") + 2] = 5
    text = base64.encodebytes(bytes(der)).decode()
    csr = f"-----BEGIN CERTIFICATE REQUEST-----\n{text}-----END CERTIFICATE REQUEST-----\n"
    with pytest.raises(ConcordatError):
        authority.sign_request(csr, "site", SITE, 1.0)
