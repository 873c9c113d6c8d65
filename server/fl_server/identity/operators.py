"""Admins and auditors: certificates that this coordinator issued, each of which can be revoked.

The role in a certificate says what its holder may do; a row here says that it is still valid. Read on every call,
so that a revocation takes effect on the next one.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from sqlalchemy import select

from fl_server.db.models import EventRow, OperatorRow
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome, ServerSettings, reachable
from fl_server.identity.authority import Authority, Identity, identity
from fl_shared.errors import ConcordatError, ConfigError, EnrolmentError
from fl_shared.files import write_durably
from fl_shared.names import operator_name
from fl_shared.runtime.limits import ConcurrencyLimit
from fl_shared.wire.hosts import host_and_port

OPERATOR_ROLES = ("admin", "auditor")
OPERATOR_DAYS = 365
MAX_AUDITORS, MAX_AN_AUDITOR = 12, 6  # calls of the control API at once, of all auditors together and of one


def is_valid(row: OperatorRow, now: float | None = None) -> bool:
    """Whether a certificate that was issued opens anything: neither revoked nor expired."""
    return not row.revoked_at and row.expires_at >= (time.time() if now is None else now)


class Operators:
    """The admins and auditors of one coordinator."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def of(cls, home: ServerHome, store: Store) -> Operators:
        """The operators in a database. One that knows no admin learns of the first: the home has the certificate."""
        operators = cls(store)
        first = home.admin / "admin.pem"
        if first.exists() and not any(row.role == "admin" for row in operators.all()):
            operators.record(x509.load_pem_x509_certificate(first.read_bytes()))
        return operators

    def record(self, certificate: x509.Certificate) -> OperatorRow:
        """Make a certificate valid from now on."""
        who = identity(certificate.public_bytes(serialization.Encoding.DER))
        now = time.time()
        row = OperatorRow(
            fingerprint=who.fingerprint,
            role=who.role,
            name=who.name,
            issued_at=now,
            expires_at=who.expires_at,
            revoked_at=0.0,
        )
        with self._store.write() as session:
            session.add(row)
            session.add(EventRow(at=now, kind="certificate-issued", message=f"{who.role} {who.name}"))
        return row

    def authorise(self, who: Identity) -> OperatorRow:
        """The row behind a certificate that TLS has verified; EnrolmentError when it is not valid (any more)."""
        with self._store.read() as session:
            row = session.get(OperatorRow, who.fingerprint)
        fix = f"get another one on the coordinator: `fl-server issue --role {who.role} --name {who.name} --out DIR`"
        if row is None:
            raise EnrolmentError(
                f"the certificate of {who.role} {who.name} was not issued here", fix=fix, code="not-authorised"
            )
        if is_valid(row):
            return row
        if row.revoked_at:
            raise EnrolmentError(
                f"the certificate of {who.role} {who.name} was revoked", fix=fix, code="not-authorised"
            )
        raise EnrolmentError(f"the certificate of {who.role} {who.name} has expired", fix=fix, code="expired")

    def all(self) -> list[OperatorRow]:
        """Every certificate that was issued, by role and name, the newest last."""
        order = (OperatorRow.role, OperatorRow.name, OperatorRow.issued_at)
        with self._store.read() as session:
            return list(session.scalars(select(OperatorRow).order_by(*order)))

    def revoke(self, role: str, name: str) -> list[OperatorRow]:
        """Shut out every certificate of a person from the next call on.

        Raises:
            ConfigError: none that is valid; or it is the last admin's, after which nobody could administer.
        """
        now = time.time()
        with self._store.write() as session:
            valid = [row for row in session.scalars(select(OperatorRow)) if is_valid(row, now)]
            revoked = [row for row in valid if (row.role, row.name) == (role, name)]
            if not revoked:
                raise ConfigError(
                    f"there is no valid certificate of {role} {name!r}", fix="see `fl-server issued` for the names"
                )
            if role == "admin" and all(row in revoked for row in valid if row.role == "admin"):
                raise ConfigError(
                    f"{name!r} is the last admin", fix="issue another admin's certificate first: `fl-server issue`"
                )
            for row in revoked:
                row.revoked_at = now
            session.add(EventRow(at=now, kind="certificate-revoked", message=f"{role} {name}"))
        return revoked


class AuditorLimit:
    """How many calls auditors have under way. A stream that its reader does not read holds a thread of the API."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all, self._each = ConcurrencyLimit(MAX_AUDITORS), ConcurrencyLimit(MAX_AN_AUDITOR)

    @contextlib.contextmanager
    def held(self, who: Identity) -> Iterator[None]:
        """Count the block as a call; ConcordatError when it is one too many. Admins are not counted."""
        if who.role == "admin":
            yield
            return
        with self._lock:
            if not self._each.acquire(who.name):
                raise _too_many()
            if not self._all.acquire(""):
                self._each.release(who.name)
                raise _too_many()
        try:
            yield
        finally:
            with self._lock:
                self._all.release("")
                self._each.release(who.name)


def _too_many() -> ConcordatError:
    return ConcordatError("too many calls at once", fix="end another `fl-admin` of an auditor", code="too-many")


def write_credentials(
    authority: Authority,
    settings: ServerSettings,
    *,
    role: str,
    name: str,
    out: Path,
    request: Path | None = None,
    days: float = OPERATOR_DAYS,
) -> x509.Certificate:
    """Write a certificate and a profile for `fl-admin` into `out`, and a key unless `request` brings its own.

    With `request` (PEM) the private key is made by its owner and never travels; the profile expects it as
    `<role>.key` beside it.

    Raises:
        ConfigError: another role, a name of another form, files that exist already, a folder that cannot be written.
        EnrolmentError: the request is not valid.
    """
    if role not in OPERATOR_ROLES:
        raise ConfigError(f"the role {role!r} cannot be issued", fix=f"choose {' or '.join(OPERATOR_ROLES)}")
    operator_name(name)
    key, certificate_file, profile = (out / f"{role}.{ending}" for ending in ("key", "pem", "toml"))
    existing = [path for path in (key, certificate_file, profile) if path.exists() and (path != key or request is None)]
    if existing:
        raise ConfigError(f"{existing[0]} exists", fix="choose another --out; nothing is ever overwritten")
    open_to_all = reachable(settings.control_host) != settings.control_host
    target = settings.host if open_to_all else settings.control_host
    text = (
        f"[admin]\ncontrol = {json.dumps(host_and_port(target, settings.control_port))}\n"
        f'ca = "ca.pem"\ncertificate = "{certificate_file.name}"\nkey = "{key.name}"\n'
    )
    try:
        if request is None:
            certificate = authority.issue_client(key, certificate_file, role, name, days)
        else:
            certificate = authority.sign_request(request.read_text("utf-8"), role, name, days)
            write_durably(certificate_file, certificate.public_bytes(serialization.Encoding.PEM), mode=0o644)
        write_durably(out / "ca.pem", authority.pem.encode("ascii"), mode=0o644)
        write_durably(profile, text.encode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{out}: {error}", fix="choose another --out, or fix --request") from error
    return certificate
