"""Enrolment: what is pinned, what is refused, and what a failed attempt leaves."""

from __future__ import annotations

import json
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fl_client.identity.enrolment import Coordinator, enrol
from fl_client.identity.gateway import GatewayClient
from fl_client.site.address import server_url
from fl_client.site.home import SiteHome
from fl_shared.errors import EnrolmentError, TransportError
from fl_shared.identity.signing import SigningKey
from fl_shared.identity.token import Token
from helpers.gateway import Authority, Gateway

SITE = "hospital-001"


def files(home: SiteHome) -> set[str]:
    """Every file below the home, except what a retry may reuse, and the lock."""
    found = {str(p.relative_to(home.root)) for p in home.root.rglob("*") if p.is_file()}
    return {name for name in found if not name.startswith("pending/")} - {"run/enrol.lock"}


def test_enrolment_makes_keys_locally_and_pins_the_coordinator(gateway: Gateway, tmp_path: Path) -> None:
    """After enrolment the keys lie 0600 in their places and only public halves were sent."""
    home = SiteHome(tmp_path / "home")
    pinned = enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    assert pinned == Coordinator.load(home)
    assert pinned.coordinator_key == gateway.signing.public_hex
    for path in (home.signing_key, home.client_key, home.node_key, home.fingerprint_key, home.coordinator):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    assert stat.S_IMODE(home.root.stat().st_mode) == 0o700
    ((_, sent),) = gateway.requests
    assert set(sent) == {"site", "token", "csr_pem", "signing_public_key", "node_public_key", "proofs"}
    assert sent["signing_public_key"] == SigningKey.load(home.signing_key).public_hex
    assert "PRIVATE" not in json.dumps(sent)
    csr = x509.load_pem_x509_csr(sent["csr_pem"].encode())
    assert csr.subject.rfc4514_string() == f"CN={SITE},OU=site,O=concordat"
    assert load_ssh_private_key(home.node_key.read_bytes(), None).key_size == 384  # type: ignore[union-attr]
    assert not (home.root / "pending").exists()


def test_a_wrong_secret_is_refused_and_the_retry_uses_the_same_keys(gateway: Gateway, tmp_path: Path) -> None:
    """A refused token leaves no live file; the next attempt presents the same public keys and succeeds."""
    home = SiteHome(tmp_path / "home")
    with pytest.raises(EnrolmentError, match="token is not valid"):
        enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE, secret="wrong-wrong-wrong-wrong-wrong-wr"))
    assert files(home) == set()
    enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    first, second = (asked for _, asked in gateway.requests)
    assert first["signing_public_key"] == second["signing_public_key"]
    assert first["node_public_key"] == second["node_public_key"]


def test_another_ca_than_the_tokens_is_refused_before_anything_is_sent(gateway: Gateway, tmp_path: Path) -> None:
    """A man in the middle with his own CA gets no request and no key is made."""
    home = SiteHome(tmp_path / "home")
    with pytest.raises(EnrolmentError, match="not the one that the token names"):
        enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE, ca="0" * 64))
    assert gateway.requests == []
    assert not home.root.exists()


def test_a_token_for_another_site_is_refused(gateway: Gateway, tmp_path: Path) -> None:
    """The token names its site."""
    with pytest.raises(EnrolmentError, match="hospital-002"):
        enrol(SiteHome(tmp_path), site=SITE, server=gateway.url, token=gateway.token("hospital-002"))


@pytest.mark.parametrize("text", ["", "ct1", "ct2.a.bbbbbbbbbbbbbbbbbb." + "0" * 64, "ct1.a.b.c", "ct1.a." + "b" * 20])
def test_a_malformed_token_is_named_without_being_shown(text: str) -> None:
    """The message tells the form; the secret itself is not repeated."""
    with pytest.raises(EnrolmentError, match="form") as failure:
        Token.parse(text)
    assert "b" * 20 not in str(failure.value)


@pytest.mark.parametrize("text", ["http://h:1", "https://h", "h:9443", "https://h:9443/x", "https://h:port", ""])
def test_an_address_of_another_form_is_refused(text: str) -> None:
    """Only https://HOST:PORT is accepted."""
    with pytest.raises(EnrolmentError, match="https://HOST:PORT"):
        server_url(text)


def _other_key(answer: dict[str, Any]) -> dict[str, Any]:
    other = Authority()
    return {**answer, "certificate_pem": other.pem}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_other_key, "not valid"),
        (lambda a: {**a, "certificate_pem": a["ca_pem"]}, "another key"),
        (lambda a: {**a, "certificate_pem": "nonsense"}, "not valid"),
        (lambda a: {**a, "coordinator_key": "abc"}, "no valid signing key"),
        (lambda a: {**a, "fleet_path": "../x"}, "fleet path"),
        (lambda a: {k: v for k, v in a.items() if k != "certificate_pem"}, "not valid"),
    ],
)
def test_a_bad_answer_changes_nothing(gateway: Gateway, tmp_path: Path, change: Any, message: str) -> None:
    """Each part of the coordinator's answer is checked before the first file is moved into place."""
    home = SiteHome(tmp_path / "home")
    gateway.change_answer = change
    with pytest.raises(EnrolmentError, match=message):
        enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    assert files(home) == set()
    gateway.change_answer = lambda answer: answer
    enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))


def test_a_second_enrolment_needs_force_and_keeps_the_signing_key(gateway: Gateway, tmp_path: Path) -> None:
    """--force replaces certificate and node key, keeps the old pair aside, and never touches the signing key."""
    home = SiteHome(tmp_path / "home")
    enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    kept = {path: path.read_bytes() for path in (home.signing_key, home.fingerprint_key)}
    old, old_node = home.client_key.read_bytes(), home.node_key.read_bytes()
    with pytest.raises(EnrolmentError, match="enrolled already"):
        enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE))
    enrol(home, site=SITE, server=gateway.url, token=gateway.token(SITE), force=True)
    assert {path: path.read_bytes() for path in kept} == kept
    assert home.client_key.read_bytes() != old
    assert home.node_key.read_bytes() != old_node
    assert [p.read_bytes() for p in (home.tls / "replaced").rglob("client.key")] == [old]


def test_two_enrolments_at_once_in_one_home_leave_keys_that_fit(gateway: Gateway, tmp_path: Path) -> None:
    """Real processes: one enrols, the others say so, and key, certificate and signing key belong together."""
    home = SiteHome(tmp_path / "home")
    line = [
        sys.executable, "-m", "fl_client.cli.client", "enroll", "--site", SITE, "--home", str(home.root),
        "--server", gateway.url, "--token", gateway.token(SITE),
    ]  # fmt: skip
    processes = [subprocess.Popen(line, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL) for _ in range(4)]
    said = [process.communicate(timeout=120)[1].decode() for process in processes]
    assert sorted(process.returncode for process in processes)[0] == 0
    assert {process.returncode for process in processes} <= {0, 2, 17}, said
    assert sum(process.returncode == 0 for process in processes) == 1, said
    assert GatewayClient.of_site(home, Coordinator.load(home).server).hello()["site"] == SITE
    sent = {asked["signing_public_key"] for _, asked in gateway.requests}
    assert SigningKey.load(home.signing_key).public_hex in sent
    assert not (home.root / "pending").exists()


def test_no_answer_is_a_transport_error_with_the_address(tmp_path: Path) -> None:
    """A closed port names the address that was tried."""
    with pytest.raises(TransportError, match=r"https://127\.0\.0\.1:9/v1/ca"):
        enrol(
            SiteHome(tmp_path / "home"),
            site=SITE,
            server="https://127.0.0.1:9",
            token=f"ct1.{SITE}.{'s' * 32}.{'0' * 64}",
        )


def test_a_damaged_coordinator_file_is_named(tmp_path: Path) -> None:
    """A truncated coordinator.json is reported with its path."""
    home = SiteHome(tmp_path)
    home.coordinator.write_text('{"site": "hosp')
    with pytest.raises(EnrolmentError, match=r"coordinator\.json"):
        Coordinator.load(home)
