"""Admins and auditors: certificates that this coordinator issued, each of which can be revoked.

The role in a certificate says what its holder may do; a row here says that it still counts. Read on every call,
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
from fl_shared.runtime.limits import Places
from fl_shared.wire.hosts import host_and_port

OPERATOR_ROLES = ("admin", "auditor")
OPERATOR_DAYS = 365
MAX_AUDITORS, MAX_AN_AUDITOR = 12, 6  # calls of the control API at once, of all auditors together and of one


class Operators:
    """The admins and auditors of one coordinator."""

    def __init__(self, store: Store) -> None:
        self._store = store

    @classmethod
    def of(cls, home: ServerHome, store: Store) -> Operators:
        """The operators in a database. One that knows no admin learns of the first: the home has the certificate."""
        made = cls(store)
        first = home.admin / "admin.pem"
        if first.exists() and not any(row.role == "admin" for row in made.all()):
            made.record(x509.load_pem_x509_certificate(first.read_bytes()))
        return made

    def record(self, certificate: x509.Certificate) -> OperatorRow:
        """Let a certificate count from now on."""
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
        """The row behind a certificate that TLS has verified; EnrolmentError when it does not count (any more)."""
        with self._store.read() as session:
            row = session.get(OperatorRow, who.fingerprint)
        fix = f"get another one on the coordinator: `fl-server issue --role {who.role} --name {who.name} --out DIR`"
        if row is None:
            raise EnrolmentError(
                f"the certificate of {who.role} {who.name} was not issued here", fix=fix, code="not-authorised"
            )
        if row.revoked_at:
            raise EnrolmentError(
                f"the certificate of {who.role} {who.name} was revoked", fix=fix, code="not-authorised"
            )
        if row.expires_at < time.time():
            raise EnrolmentError(f"the certificate of {who.role} {who.name} has expired", fix=fix, code="expired")
        return row

    def all(self) -> list[OperatorRow]:
        """Every certificate that was issued, by role and name, the newest last."""
        order = (OperatorRow.role, OperatorRow.name, OperatorRow.issued_at)
        with self._store.read() as session:
            return list(session.scalars(select(OperatorRow).order_by(*order)))

    def revoke(self, role: str, name: str) -> list[OperatorRow]:
        """Shut out every certificate of a person from the next call on.

        Raises:
            ConfigError: none that counts; or it is the last admin's, after which nobody could administer.
        """
        now = time.time()
        with self._store.write() as session:
            valid = list(
                session.scalars(select(OperatorRow).where(OperatorRow.revoked_at == 0.0, OperatorRow.expires_at > now))
            )
            found = [row for row in valid if (row.role, row.name) == (role, name)]
            if not found:
                raise ConfigError(
                    f"there is no valid certificate of {role} {name!r}", fix="see `fl-server issued` for the names"
                )
            if role == "admin" and all(row in found for row in valid if row.role == "admin"):
                raise ConfigError(
                    f"{name!r} is the last admin", fix="issue another admin's certificate first: `fl-server issue`"
                )
            for row in found:
                row.revoked_at = now
            session.add(EventRow(at=now, kind="certificate-revoked", message=f"{role} {name}"))
        return found


class AuditorPlaces:
    """The calls that auditors have under way. A stream that its reader does not read holds a thread of the API."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._all, self._each = Places(MAX_AUDITORS), Places(MAX_AN_AUDITOR)

    @contextlib.contextmanager
    def taken(self, who: Identity) -> Iterator[None]:
        """Hold a place while the block runs; ConcordatError when there is none. Admins are not counted."""
        if who.role == "admin":
            yield
            return
        with self._lock:
            if not self._each.take(who.name):
                raise _too_many()
            if not self._all.take(""):
                self._each.give_back(who.name)
                raise _too_many()
        try:
            yield
        finally:
            with self._lock:
                self._all.give_back("")
                self._each.give_back(who.name)


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
    taken = [each for each in (key, certificate_file, profile) if each.exists() and (each != key or request is None)]
    if taken:
        raise ConfigError(f"{taken[0]} exists", fix="choose another --out; nothing is ever overwritten")
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
        raise ConfigError(f"{out}: {error}", fix="choose another --out, or mend --request") from error
    return certificate
