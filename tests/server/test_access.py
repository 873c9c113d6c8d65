"""No door without a check: every call of the control API is an action of one table, and the table is kept to.

The same over real TLS and processes: `test_operators.py`.
"""

from __future__ import annotations

import datetime as dt
import json
from pathlib import Path
from typing import Any, cast

import grpc
import pytest
from cryptography import x509
from hypothesis import given
from hypothesis import strategies as st

from fl_server.access.check import ACTIONS, Access, Action, recorded_arguments
from fl_server.access.log import AdminLog, local_user
from fl_server.control.calls import ACTION_OF_CALL, CheckedCalls
from fl_server.control.service import Control
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.identity.authority import Authority, Identity
from fl_server.identity.operators import Operators
from fl_server.operations.setup import initialise
from fl_shared.errors import ConcordatError, EnrolmentError
from fl_shared.identity.x509 import fingerprint
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlServicer, add_ControlServicer_to_server

CALLS = {each.name: each for each in pb.DESCRIPTOR.services_by_name["Control"].methods}
SERVICE = pb.DESCRIPTOR.services_by_name["Control"].full_name
ROLES = ("admin", "auditor", "site", "host", "owner", "Admin", "")


class Office:
    """A coordinator's home with an admin, an auditor and a site's certificate, and the check over it."""

    def __init__(self, root: Path) -> None:
        self.home = initialise(root, host="127.0.0.1", gateway_port=9443, control_port=9444, admin="chief")
        self.authority = Authority.load(self.home.ca_key, self.home.ca)
        self.store = Store(self.home.database_url())
        self.operators = Operators.of(self.home, self.store)
        self.log = AdminLog.of(self.home, self.store)
        self.access = Access(self.operators, self.log)

    def certificate(self, role: str, name: str, *, recorded: bool = True, days: float = 30.0) -> x509.Certificate:
        folder = self.home.root.parent / f"{role}-{name}"
        made = self.authority.issue_client(folder / "key", folder / "pem", role, name, days)
        if recorded:
            self.operators.record(made)
        return made

    def entries(self) -> list[tuple[str, dict[str, Any]]]:
        return [(row.kind, json.loads(row.body)) for row in self.log.entries() if row.kind != "genesis"]


def _who(certificate: x509.Certificate, role: str, name: str) -> Identity:
    return Identity(role, name, fingerprint(certificate), certificate.not_valid_after_utc.timestamp())


@pytest.fixture(scope="module")
def office(tmp_path_factory: pytest.TempPathFactory) -> Office:
    """One for the whole module."""
    return Office(tmp_path_factory.mktemp("access") / "c")


@pytest.fixture(scope="module")
def admin(office: Office) -> Identity:
    """An admin whose certificate is valid."""
    return _who(office.certificate("admin", "anna"), "admin", "anna")


@pytest.fixture(scope="module")
def auditor(office: Office) -> Identity:
    """An auditor whose certificate is valid."""
    return _who(office.certificate("auditor", "ada"), "auditor", "ada")


def test_every_call_of_the_control_api_is_an_action_and_every_action_has_a_call() -> None:
    """Whoever adds a call to `control.proto` must say what it does and who may; no action is left without a door."""
    assert set(ACTION_OF_CALL) == set(CALLS)
    assert set(ACTION_OF_CALL.values()) == set(ACTIONS)
    assert len(set(ACTION_OF_CALL.values())) == len(ACTION_OF_CALL)
    for call in CALLS:
        assert getattr(Control, call) is not getattr(ControlServicer, call), f"{call} is not implemented"


def test_who_may_what_is_written_down_once() -> None:
    """Auditors and admins look; only admins change anything, and every change is recorded with every argument."""
    for call, name in ACTION_OF_CALL.items():
        action = ACTIONS[name]
        assert action.recorded == (action.roles == ("admin",)), name
        assert set(action.roles) <= {"admin", "auditor"}
        fields = {field.name for field in CALLS[call].input_type.fields}
        assert set(action.arguments) <= fields, name
        if action.recorded and name not in ("sites invite", "sites revoke"):
            assert set(action.arguments) == fields, f"{call} has a field that is not recorded"
    assert {field.name for field in pb.InviteSiteRequest.DESCRIPTOR.fields} == set(ACTIONS["sites invite"].arguments)
    assert {field.name for field in pb.SiteRequest.DESCRIPTOR.fields} == set(ACTIONS["sites revoke"].arguments)


@given(
    action=st.sampled_from([*ACTIONS, "sites delete", ""]),
    role=st.sampled_from(ROLES) | st.text(max_size=8),
    argument=st.text(max_size=3),
)
def test_a_role_that_the_table_does_not_name_does_nothing(
    office: Office, admin: Identity, action: str, role: str, argument: str
) -> None:
    """Any role and any action, with a certificate that is valid for an admin: refused before anything is done, and
    nothing is written; where the table names the role, the action is done and, if it changes something, recorded.
    """
    who = Identity(role, admin.name, admin.fingerprint, admin.expires_at)
    allowed = action in ACTIONS and role in ACTIONS[action].roles
    before, done, refused = office.entries(), [], None
    try:
        with office.access.acting(who, action, {"run": argument, "secret": "s3cr3t"}):
            during = office.entries()
            done.append(1)
    except ConcordatError as error:
        refused = error
    assert bool(done) == allowed
    assert (refused.code if refused else "") == ("" if allowed else "wrong-role")
    after = office.entries()[len(before) :]
    if not allowed or not ACTIONS[action].recorded:
        assert after == []
        return
    assert [kind for kind, _ in during[len(before) :]] == ["action"]
    assert [kind for kind, _ in after] == ["action", "outcome"]
    body = after[0][1]
    assert (body["action"], body["role"], body["name"], body["fingerprint"]) == (
        action, role, admin.name, admin.fingerprint,
    )  # fmt: skip
    assert body["arguments"] == ({"run": argument} if "run" in ACTIONS[action].arguments else {})
    assert after[1][1]["result"] == "done"


@pytest.mark.parametrize("action", sorted(ACTIONS))
def test_a_certificate_that_is_not_valid_opens_nothing(office: Office, action: str) -> None:
    """Revoked, expired, never recorded: for every action, also for those that its role may."""
    cases = {
        "was revoked": _who(_certificate(office, "gone"), "admin", "gone"),
        "has expired": _who(_certificate(office, "old", days=-1 / 1440), "admin", "old"),
        "not issued here": _who(_certificate(office, "ghost", recorded=False), "admin", "ghost"),
    }
    if not any(row.revoked_at for row in office.operators.all()):
        office.operators.revoke("admin", "gone")
    before = office.entries()
    for word, who in cases.items():
        with pytest.raises(EnrolmentError, match=word), office.access.acting(who, action, {}):
            pytest.fail(f"{who.name} has done {action}")
    assert office.entries() == before


_certificates: dict[str, x509.Certificate] = {}


def _certificate(office: Office, name: str, **more: Any) -> x509.Certificate:
    if name not in _certificates:
        _certificates[name] = office.certificate("admin", name, **more)
    return _certificates[name]


def test_who_types_on_the_machine_itself_is_no_certificate(office: Office) -> None:
    """The role of `fl-server` on the coordinator's machine opens no door of the control API."""
    with pytest.raises(ConcordatError, match="the role host may not"), office.access.acting(local_user(), "status", {}):
        pytest.fail("it was let in")


def test_an_action_that_is_refused_or_breaks_off_is_recorded_as_such(office: Office, admin: Identity) -> None:
    """The block's own refusal goes on with its code, a defect by its type alone."""
    before = len(office.entries())
    with pytest.raises(ConcordatError), office.access.acting(admin, "runs stop", {"run": "x"}):
        raise ConcordatError("there is no run 'x'", code="unknown-run")
    with pytest.raises(ZeroDivisionError), office.access.acting(admin, "runs stop", {"run": "x"}):
        raise ZeroDivisionError("a text that may quote anything")
    outcomes = [body for kind, body in office.entries()[before:] if kind == "outcome"]
    assert [(each["result"], each["code"]) for each in outcomes] == [("refused", "unknown-run"), ("failed", "defect")]


def test_a_spec_is_recorded_by_name_and_hash_and_a_long_text_is_cut() -> None:
    """Its text stays out of the log; one that cannot be read leaves its hash."""
    action = Action(("admin",), recorded=True, arguments=("spec_toml", "reason"))
    told = recorded_arguments(action, {"spec_toml": "nonsense", "reason": "y" * 5000, "other": "z"})
    assert set(told) == {"spec_sha256", "reason"}
    assert told["reason"].endswith("(5000 characters)")
    assert len(told["reason"]) < 1100


# --- The gRPC side


class _Handlers:
    """Stands for a server, to see the handlers that the generated code makes."""

    handlers: dict[str, Any]

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        pass

    def add_registered_method_handlers(self, _service: str, handlers: dict[str, Any]) -> None:
        self.handlers = handlers


class _Aborted(Exception):
    pass


class _Context:
    """A call's context with a client certificate that TLS has verified."""

    def __init__(self, certificate: x509.Certificate) -> None:
        from cryptography.hazmat.primitives.serialization import Encoding

        self._pem = certificate.public_bytes(Encoding.PEM)
        self.told: tuple[grpc.StatusCode, str] | None = None

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem]}

    def abort(self, code: grpc.StatusCode, details: str) -> None:
        self.told = (code, json.loads(details)["code"])
        raise _Aborted


class _Details:
    def __init__(self, call: str) -> None:
        self.method = f"/{SERVICE}/{call}"
        self.invocation_metadata = ()


def _open(checked: CheckedCalls, call: str, handler: Any) -> Any:
    found = checked.intercept_service(lambda _: handler, cast("grpc.HandlerCallDetails", _Details(call)))
    assert found is not None
    return found


def test_what_streams_is_what_the_proto_says(office: Office) -> None:
    """Behind the check every call is of the kind that its descriptor names."""
    server = _Handlers()
    add_ControlServicer_to_server(Control(office.home, office.store), server)
    assert set(server.handlers) == set(CALLS)
    for call, method in CALLS.items():
        checked = _open(CheckedCalls(office.access), call, server.handlers[call])
        assert checked.response_streaming == method.server_streaming, call
        assert (checked.unary_stream is not None) == method.server_streaming, call
    nothing = cast("grpc.HandlerCallDetails", _Details("Nothing"))
    assert CheckedCalls(office.access).intercept_service(lambda _: None, nothing) is None


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_without_an_action_is_closed_to_everybody(office: Office, streams: bool) -> None:
    """Somebody adds a call and forgets the table: not even an admin gets through, and it does nothing."""
    done: list[int] = []
    context = _Context(_certificate(office, "anybody"))

    def answer(_request: object, _context: object) -> Any:
        done.append(1)
        return iter(())

    kind = grpc.unary_stream_rpc_method_handler if streams else grpc.unary_unary_rpc_method_handler
    checked = _open(CheckedCalls(office.access), "DeleteEverything", kind(answer))
    call = checked.unary_stream if streams else checked.unary_unary
    with pytest.raises(_Aborted):
        list(call(pb.StatusRequest(), context) or ())
    assert context.told == (grpc.StatusCode.PERMISSION_DENIED, "wrong-role")
    assert done == []


def test_a_new_home_has_the_same_check(tmp_path: Path) -> None:
    """`Access.of` reads operators and key from the home: the first admin may, nobody else."""
    home = initialise(tmp_path / "c", host="127.0.0.1", gateway_port=9443, control_port=9444, admin="chief")
    access = Access.of(ServerHome(home.root), Store(home.database_url()))
    first = x509.load_pem_x509_certificate((home.admin / "admin.pem").read_bytes())
    assert first.not_valid_after_utc > dt.datetime.now(dt.UTC)
    with access.acting(_who(first, "admin", "chief"), "status", {}):
        pass
