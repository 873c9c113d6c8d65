"""Admins and auditors: what their certificates let them do, over real mutual TLS with the control API as a process."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_server.access.log import AdminLog, local_user
from fl_server.cli.connection import Profile, control
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority
from fl_server.identity.operators import MAX_AN_AUDITOR, Operators, write_credentials
from fl_server.operations.setup import initialise
from fl_shared.errors import ConcordatError, ConfigError, EnrolmentError
from fl_shared.wire import control_pb2 as pb
from helpers.coordinators import BIN, environment, kill_tree, until
from helpers.ports import free_port

READS = {
    "Status", "ListSites", "ShowSite", "ListRuns", "ShowRun", "WatchRun", "ListReceipts", "ListAdapters",
    "ListReleases", "ListAdminLog",
}  # fmt: skip
CALLS = pb.DESCRIPTOR.services_by_name["Control"].methods

pytestmark = pytest.mark.timeout(180)


class Office:
    """A coordinator's home and its control API as a process; nothing else runs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.home = initialise(
            root / "c", host="127.0.0.1", gateway_port=free_port(), control_port=free_port(), admin="chief"
        )
        self.authority = Authority.load(self.home.ca_key, self.home.ca)
        self.operators = Operators.of(self.home, Store(self.home.database_url()))
        with (root / "control.log").open("wb") as sink:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "fl_server.control", "--home", str(self.home.root)],
                env=environment(), stdout=sink, stderr=sink, stdin=subprocess.DEVNULL,
            )  # fmt: skip
        until(self._answers, "the control API answers", 60.0)

    def _answers(self) -> bool:
        try:
            return self.status(self.home.admin / "admin.toml").version != ""
        except ConcordatError:
            return False

    def status(self, profile: Path) -> pb.StatusReply:
        with control(Profile.find(profile)) as stub:
            reply: pb.StatusReply = stub.Status(pb.StatusRequest(), timeout=20)
            return reply

    def server(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`fl-server VERB ...` on this home."""
        line = [str(BIN / "fl-server"), arguments[0], "--home", str(self.home.root), *arguments[1:]]
        return subprocess.run(line, env=environment(), capture_output=True, text=True, timeout=60, check=False)

    def issue(self, role: str, name: str, **more: Any) -> Path:
        """A certificate as `fl-server issue` makes it; its profile."""
        out = self.root / f"{role}-{name}"
        made = write_credentials(self.authority, self.home.settings(), role=role, name=name, out=out, **more)
        self.operators.record(made)
        return out / f"{role}.toml"

    def ask(self, profile: Path, call: str) -> tuple[grpc.StatusCode, str]:
        """Status code, and the code of our error, of a call with an empty request."""
        found = Profile.find(profile)
        credentials = grpc.ssl_channel_credentials(
            found.ca.read_bytes(), found.key.read_bytes(), found.certificate.read_bytes()
        )
        method = next(each for each in CALLS if each.name == call)
        request = getattr(pb, method.input_type.name)()
        with grpc.secure_channel(found.control, credentials) as channel:
            path = f"/{method.containing_service.full_name}/{call}"
            if method.server_streaming:
                answers = channel.unary_stream(path, lambda body: body.SerializeToString(), bytes)
                act: Any = lambda: list(answers(request, timeout=20))  # noqa: E731
            else:
                answer = channel.unary_unary(path, lambda body: body.SerializeToString(), bytes)
                act = lambda: answer(request, timeout=20)  # noqa: E731
            try:
                act()
            except grpc.RpcError as error:
                details = error.details() or ""
                return error.code(), json.loads(details)["code"] if details.startswith("{") else details
        return grpc.StatusCode.OK, ""


@pytest.fixture(scope="module")
def office() -> Iterator[Office]:
    """One for the whole module."""
    root = Path(tempfile.mkdtemp(prefix="op-"))
    made = None
    try:
        made = Office(root)
        yield made
    finally:
        if made is not None:
            kill_tree(made.process.pid)
            made.process.wait()
        shutil.rmtree(root, ignore_errors=True)


@pytest.fixture(scope="module")
def auditor(office: Office) -> Path:
    """An auditor's profile, from the command."""
    out = office.root / "ada"
    done = office.server("issue", "--role", "auditor", "--name", "ada", "--out", str(out), "--json")
    assert done.returncode == 0, done.stderr
    facts = json.loads(done.stdout)
    assert (facts["role"], facts["name"], facts["profile"]) == ("auditor", "ada", str(out / "auditor.toml"))
    return out / "auditor.toml"


@pytest.mark.parametrize("call", sorted(each.name for each in CALLS))
def test_an_auditor_reads_and_changes_nothing(office: Office, auditor: Path, call: str) -> None:
    """Every call of the control API, those to come included: what is not known to read is refused to an auditor."""
    status, error = office.ask(auditor, call)
    if call in READS:
        assert status is not grpc.StatusCode.PERMISSION_DENIED, error
    else:
        assert (status, error) == (grpc.StatusCode.PERMISSION_DENIED, "wrong-role")


@pytest.mark.parametrize("call", sorted(each.name for each in CALLS))
def test_a_sites_certificate_opens_nothing_here(office: Office, call: str) -> None:
    """Not one call."""
    folder = office.root / "site"
    if not folder.exists():
        office.authority.issue_client(folder / "site.key", folder / "site.pem", "site", "hospital-001", 30)
        text = (office.home.admin / "admin.toml").read_text()
        (folder / "site.toml").write_text(text.replace('"admin.', '"site.'))
        shutil.copy(office.home.ca, folder / "ca.pem")
    assert office.ask(folder / "site.toml", call) == (grpc.StatusCode.PERMISSION_DENIED, "wrong-role")


def test_nobody_without_a_certificate_of_this_authority_is_spoken_to(office: Office, tmp_path: Path) -> None:
    """No certificate, or one of another CA with the admin's name in it: no handshake."""
    Authority.create(tmp_path / "ca.key", tmp_path / "other.pem").issue_client(
        tmp_path / "admin.key", tmp_path / "admin.pem", "admin", "chief", 30
    )
    settings = office.home.settings()
    target = f"127.0.0.1:{settings.control_port}"
    pair = ((tmp_path / "admin.key").read_bytes(), (tmp_path / "admin.pem").read_bytes())
    for key, certificate in ((None, None), pair):
        credentials = grpc.ssl_channel_credentials(office.home.ca.read_bytes(), key, certificate)
        with grpc.secure_channel(target, credentials) as channel:
            call = channel.unary_unary("/concordat.control.v1.Control/Status", None, None)
            with pytest.raises(grpc.RpcError) as failure:
                call(b"", timeout=20)
            assert failure.value.code() == grpc.StatusCode.UNAVAILABLE


def test_older_tls_is_refused(office: Office) -> None:
    """TLS 1.2 gets no handshake even with an admin's certificate, 1.3 does."""
    for version, accepted in ((ssl.TLSVersion.TLSv1_2, False), (ssl.TLSVersion.TLSv1_3, True)):
        context = ssl.create_default_context(cafile=str(office.home.ca))
        context.maximum_version = version
        context.set_alpn_protocols(["h2"])
        context.load_cert_chain(office.home.admin / "admin.pem", office.home.admin / "admin.key")
        plain = socket.create_connection(("127.0.0.1", office.home.settings().control_port), timeout=20)
        with contextlib.closing(plain), contextlib.ExitStack() as stack:
            if not accepted:
                stack.enter_context(pytest.raises((ssl.SSLError, OSError)))
            with context.wrap_socket(plain, server_hostname="127.0.0.1") as connection:
                assert connection.recv(1)


def test_a_revoked_operator_is_shut_out_from_the_next_call_on(office: Office) -> None:
    """By the command, while the control API runs and on a channel that is open; others go on."""
    office.issue("auditor", "bob")
    profile = office.issue("admin", "bob")
    with control(Profile.find(profile)) as stub:
        assert stub.Status(pb.StatusRequest(), timeout=20).version
        done = office.server("revoke", "--role", "admin", "--name", "bob", "--json")
        assert done.returncode == 0, done.stderr
        with pytest.raises(EnrolmentError, match="was revoked"):
            _status_again(stub, profile)
    assert office.status(office.root / "auditor-bob" / "auditor.toml").version
    assert office.status(office.home.admin / "admin.toml").version
    listed = json.loads(office.server("issued", "--json").stdout)["certificates"]
    assert {each["role"]: bool(each["revoked_at"]) for each in listed if each["name"] == "bob"} == {
        "admin": True,
        "auditor": False,
    }


def _status_again(stub: Any, profile: Path) -> None:
    from fl_server.cli.connection import _translated

    try:
        stub.Status(pb.StatusRequest(), timeout=20)
    except grpc.RpcError as error:
        raise _translated(error, Profile.find(profile)) from None


def test_a_certificate_that_nobody_recorded_does_not_count(office: Office, tmp_path: Path) -> None:
    """Made with the CA's key behind the coordinator's back: the right role and name are not enough."""
    write_credentials(office.authority, office.home.settings(), role="admin", name="ghost", out=tmp_path)
    assert office.ask(tmp_path / "admin.toml", "Status") == (grpc.StatusCode.PERMISSION_DENIED, "not-authorised")


def test_an_expired_certificate_is_refused_on_an_open_channel(office: Office) -> None:
    """It was valid in the handshake and is not any more at the next call."""
    profile = office.issue("auditor", "brief", days=8 / 86_400)
    certificate = x509.load_pem_x509_certificate(Profile.find(profile).certificate.read_bytes())
    with control(Profile.find(profile)) as stub:
        assert stub.Status(pb.StatusRequest(), timeout=20).version
        until(lambda: time.time() > certificate.not_valid_after_utc.timestamp() + 0.5, "it has expired")
        with pytest.raises(EnrolmentError, match="has expired"):
            _status_again(stub, profile)


def test_the_last_admin_cannot_be_revoked(office: Office) -> None:
    """Nobody could administer afterwards; the message says what to do first."""
    done = office.server("revoke", "--role", "admin", "--name", "chief")
    assert done.returncode == 2
    assert "last admin" in done.stderr
    assert "fl-server issue" in done.stderr
    assert office.status(office.home.admin / "admin.toml").version


def test_keys_are_for_their_owner_alone_and_nothing_is_overwritten(office: Office, auditor: Path) -> None:
    """Mode 0600 for all of it; a second certificate into the same folder is refused."""
    folder = auditor.parent
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}
    assert modes == {"auditor.key": 0o600, "auditor.toml": 0o600, "auditor.pem": 0o600, "ca.pem": 0o600}
    before = (folder / "auditor.key").read_bytes()
    done = office.server("issue", "--role", "auditor", "--name", "eve", "--out", str(folder))
    assert (done.returncode, "exists" in done.stderr) == (2, True)
    assert (folder / "auditor.key").read_bytes() == before


def test_a_holder_can_keep_the_private_key(office: Office, tmp_path: Path) -> None:
    """With a signing request only a certificate is made, and it works with the key that never travelled."""
    key = ec.generate_private_key(ec.SECP384R1())
    request = x509.CertificateSigningRequestBuilder().subject_name(x509.Name([])).sign(key, hashes.SHA256())
    (tmp_path / "mine.csr").write_bytes(request.public_bytes(serialization.Encoding.PEM))
    out = tmp_path / "carl"
    done = office.server(
        "issue", "--role", "auditor", "--name", "carl", "--out", str(out), "--request", str(tmp_path / "mine.csr")
    )
    assert done.returncode == 0, done.stderr
    assert not (out / "auditor.key").exists()
    (out / "auditor.key").write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    (out / "auditor.key").chmod(0o600)
    assert office.status(out / "auditor.toml").version


def test_a_profile_or_key_that_others_can_use_is_refused(office: Office) -> None:
    """Readable keys, profiles that others may write or that belong to them, also behind links; then it works again."""
    profile = office.issue("auditor", "open")
    key = profile.with_suffix(".key")
    link = office.root / "link.toml"
    link.symlink_to(profile)
    for path, mode, word in ((key, 0o640, "read by"), (key, 0o604, "read by"), (profile, 0o620, "changed by")):
        path.chmod(mode)
        for named in (profile, link):
            with pytest.raises(ConfigError, match=word) as failure:
                office.status(named)
            assert failure.value.fix.startswith("chmod go")
        path.chmod(0o600)
    if os.geteuid() == 0:
        for path in (key, profile):
            os.chown(path, 65_534, -1)
            with pytest.raises(ConfigError, match="another user"):
                office.status(profile)
            os.chown(path, 0, -1)
    assert office.status(link).version


@pytest.mark.parametrize(
    ("arguments", "word"),
    [
        (("--role", "auditor", "--name", "Not A Name", "--out", "o"), "not a valid name"),
        (("--role", "auditor", "--name", "x", "--out", "/proc/nowhere"), "/proc/nowhere"),
        (("--role", "auditor", "--name", "x", "--out", "o", "--request", "/etc/hostname"), "request"),
    ],
)
def test_what_cannot_be_issued_is_said_without_a_traceback(
    office: Office, arguments: tuple[str, ...], word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One message, and nothing is recorded."""
    monkeypatch.chdir(tmp_path)
    before = len(office.operators.all())
    done = office.server("issue", *arguments)
    assert done.returncode in (2, 17)
    assert word in done.stderr
    assert "Traceback" not in done.stderr
    assert len(office.operators.all()) == before


def test_a_new_database_learns_of_the_first_admin_from_the_home(office: Office, tmp_path: Path) -> None:
    """`[server] database` was changed after init: the first admin's certificate counts there, too; nobody else's."""
    store = Store(f"sqlite:///{tmp_path / 'new.sqlite'}")
    store.migrate()
    rows = Operators.of(ServerHome(office.home.root), store).all()
    assert [(row.role, row.name) for row in rows] == [("admin", "chief")]
    with pytest.raises(ConfigError, match="no valid certificate"):
        Operators(store).revoke("auditor", "ada")


def test_a_reader_that_does_not_read_ends_no_admins_work(office: Office) -> None:
    """Two auditors ask for a long admin log 24 times each and take nothing of it; an admin is answered, and an auditor
    who has places left, too.
    """
    logged = AdminLog.of(office.home, Store(office.home.database_url()))
    for _ in range(24):  # as large as a log becomes in years
        logged.begin(local_user(), "test", {"reason": "x" * (1 << 20)})
    profiles = [office.issue("auditor", name) for name in ("slow", "slower")]
    office.issue("auditor", "quick")
    with contextlib.ExitStack() as stack:
        held = []
        for profile in [each for each in profiles for _ in range(3)]:  # a channel each: windows are per connection
            stub = stack.enter_context(control(Profile.find(profile)))
            held += [stub.ListAdminLog(pb.ListAdminLogRequest(), timeout=120) for _ in range(8)]
        refused = [call for call in held if _ended(call)]
        assert len(held) - len(refused) == 2 * MAX_AN_AUDITOR
        assert office.status(office.home.admin / "admin.toml").version
        for call in held:
            call.cancel()
    until(lambda: _answers(office, office.root / "auditor-slow" / "auditor.toml"), "the places are free again", 30.0)


def _ended(call: Any) -> bool:
    """Whether a call was refused; one that is held for its reader goes on."""
    try:
        next(call)
    except grpc.RpcError as error:
        return bool(json.loads(error.details() or "")["code"] == "too-many")
    return False


def _answers(office: Office, profile: Path) -> bool:
    try:
        return bool(office.status(profile).version)
    except ConcordatError:
        return False


def test_numbers_and_texts_without_measure_get_a_typed_answer(office: Office, auditor: Path) -> None:
    """Beyond 64 bits, with zero bytes, a megabyte long: no defect, and no answer that is too long to arrive."""
    with control(Profile.find(auditor)) as stub:

        def code(call: Any) -> str:
            with pytest.raises(grpc.RpcError) as failure:
                call()
            return str(json.loads(failure.value.details() or "")["code"])

        assert code(lambda: list(stub.ListAdminLog(pb.ListAdminLogRequest(after=2**64 - 1)))) == "config"
        assert code(lambda: stub.ShowRun(pb.RunRequest(run="a\0b"))) == "unknown-run"
        for text in ("a" * (1 << 20), "\U0001f600" * (1 << 18), "\x1b" * (1 << 20), "\u202e" * 1000):
            assert code(lambda text=text: stub.ShowRun(pb.RunRequest(run=text))) == "unknown-run"


def test_a_long_argument_is_cut_in_the_admin_log(office: Office) -> None:
    """Three megabytes of reason make no entry of three megabytes; its length is told."""
    with control(Profile.find(office.home.admin / "admin.toml")) as stub:
        with pytest.raises(grpc.RpcError):
            stub.RevokeSite(pb.SiteRequest(site="nobody", reason="y" * (3 << 20)))
        last = [entry for entry in stub.ListAdminLog(pb.ListAdminLogRequest()) if entry.kind == "action"][-1]
    assert len(last.body) < 4096
    assert f"({3 << 20} characters)" in last.body
