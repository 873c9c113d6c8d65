"""Enrolled sites: one-time invitations, enrolment with a proof of three keys, renewal, revocation.

Of an invitation's token (`fl_shared.identity.token`) the secret's SHA-256 alone is kept; it is valid once, and until
it expires.

A renewed certificate is valid beside the one that asked for it until it is used for the first time; from then on
it is the only one. So an answer that is lost on the way costs a site nothing.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from sqlalchemy import select
from sqlalchemy.orm import Session

from fl_server.db.models import EventRow, InvitationRow, SiteKeyRow, SiteRow
from fl_server.db.store import Store
from fl_server.flower.superlink import Flower
from fl_server.identity.authority import Authority, Identity
from fl_shared.documents.base_model import BaseModel
from fl_shared.errors import ConfigError, EnrolmentError, SignatureError
from fl_shared.identity.enrolment import statement
from fl_shared.identity.signing import ed25519_key, verify
from fl_shared.identity.token import Token
from fl_shared.identity.x509 import fingerprint
from fl_shared.names import site_id

TTL_S = 7 * 86_400.0
MAX_TTL_S = 90 * 86_400.0
_NEW_INVITATION = "ask the coordinator's administrator for a new token (`fl-admin sites invite`)"


@dataclass(frozen=True)
class Invitation:
    """What the admin hands to the institution."""

    site: str
    token: str
    expires_at: float


@dataclass(frozen=True)
class Enrolled:
    """What the gateway answers."""

    certificate_pem: str


def _node_key(text: str) -> ec.EllipticCurvePublicKey:
    """An EC P-384 key from its OpenSSH text; EnrolmentError otherwise."""
    try:
        key = serialization.load_ssh_public_key(text.strip().encode("ascii"))
    except (ValueError, UnsupportedAlgorithm) as error:
        raise EnrolmentError(
            "the node key cannot be read", fix="enrol with `fl-client enroll`", code="bad-node-key"
        ) from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or key.curve.name != "secp384r1":
        raise EnrolmentError("the node key is not EC P-384", fix="enrol with `fl-client enroll`", code="bad-node-key")
    return key


def _valid(row: SiteRow) -> tuple[str, ...]:
    """The fingerprints of a site's certificates that are valid."""
    if row.state != "enrolled":
        return ()
    return tuple(fingerprint for fingerprint in (row.certificate_fingerprint, row.next_fingerprint) if fingerprint)


def _blob(openssh: str) -> bytes:
    return base64.b64decode(openssh.split()[1])


def _as_tls(key: Any) -> str:
    """SHA-256 of a public key in the form in which TLS keys are recorded, 64 hex digits."""
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return hashlib.sha256(der).hexdigest()


def _as_node(key: Any) -> str:
    """The same in the form in which node keys are recorded: one key must not pass for two."""
    text = key.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return hashlib.sha256(_blob(text.decode("ascii"))).hexdigest()


def _require_proofs(
    proofs: Mapping[str, str], key: ec.EllipticCurvePublicKey, *, token: str, csr: str, signing: str, node: str
) -> None:
    """EnrolmentError unless signing key and node key (`key`) have signed the statement of this enrolment."""
    message = statement(token=token, csr_pem=csr, signing_key=signing, node_key=node)
    try:
        verify(signing, message, proofs.get("signing", ""))
        key.verify(bytes.fromhex(proofs.get("node", "")), message, ec.ECDSA(hashes.SHA384()))
    except (SignatureError, InvalidSignature, ValueError) as error:
        raise EnrolmentError(
            "signing key and node key are not both proved", fix="enrol with `fl-client enroll`", code="not-proved"
        ) from error


def node_key_fingerprint(openssh: str) -> str:
    """`SHA256:<base64>`, as ssh-keygen prints it."""
    return "SHA256:" + base64.b64encode(hashlib.sha256(_blob(openssh)).digest()).decode().rstrip("=")


class Sites:
    """The sites of one coordinator."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def invite(self, site: str, *, ca_sha256: str, ttl_s: float = 0.0) -> Invitation:
        """Make a one-time token. An earlier unused token of the site is valid no more."""
        site_id(site)
        ttl_s = ttl_s or TTL_S
        if not 1.0 <= ttl_s <= MAX_TTL_S:
            raise ConfigError(f"a validity of {ttl_s:g} s is refused", fix=f"choose 1 to {MAX_TTL_S:.0f} s")
        token = Token.new(site, ca_sha256)
        now = time.time()
        with self._store.write() as session:
            row = session.get(SiteRow, site)
            if row is None:
                session.add(SiteRow(site=site, state="invited", invited_at=now))
                session.flush()
            else:
                row.invited_at = now
                for earlier in session.scalars(
                    select(InvitationRow).where(InvitationRow.site == site, InvitationRow.used_at == 0.0)
                ):
                    session.delete(earlier)
            session.add(
                InvitationRow(
                    secret_hash=token.secret_sha256,
                    site=site,
                    created_at=now,
                    expires_at=now + ttl_s,
                )
            )
            session.add(EventRow(at=now, kind="site-invited", site=site))
        return Invitation(site, token.text, now + ttl_s)

    def _invitation(self, session: Session, site: str, token: str, ca_sha256: str) -> InvitationRow:
        bad = EnrolmentError("the token is not valid for this site", fix=_NEW_INVITATION, code="bad-token")
        try:
            named = Token.parse(token)
        except EnrolmentError:
            raise bad from None
        if named.site != site or not hmac.compare_digest(named.ca_sha256, ca_sha256):
            raise bad
        invitation = None
        for row in session.scalars(select(InvitationRow).where(InvitationRow.site == site)):
            if hmac.compare_digest(row.secret_hash, named.secret_sha256):
                invitation = row
        if invitation is None:
            raise bad
        if invitation.used_at:
            raise EnrolmentError("the token was used already", fix=_NEW_INVITATION, code="used-token")
        if invitation.expires_at < time.time():
            raise EnrolmentError("the token has expired", fix=_NEW_INVITATION, code="expired-token")
        return invitation

    def enrol(
        self,
        *,
        site: str,
        token: str,
        csr_pem: str,
        signing_key: str,
        node_key: str,
        proofs: Mapping[str, str],
        authority: Authority,
        flower: Flower,
        days: float,
    ) -> Enrolled:
        """Check the token and the three keys, allow the node at Flower, certify the site.

        The token is spent in the same transaction that stores the keys, so a failed attempt can be repeated.

        Raises:
            EnrolmentError: bad, used or expired token; a bad request or key; a key that is not proved, or of another
                site.
            TransportError: the SuperLink does not answer.
        """
        try:
            ed25519_key(signing_key)
        except SignatureError as error:
            raise EnrolmentError(
                f"the signing key is refused: {error.message}",
                fix="enrol with `fl-client enroll`",
                code="bad-signing-key",
            ) from error
        sent, node = node_key, _node_key(node_key)
        node_key = node.public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH).decode("ascii")
        certificate = authority.sign_request(csr_pem, "site", site, days)
        tls = certificate.public_key()
        keys = {
            hashlib.sha256(bytes.fromhex(signing_key)).hexdigest(): "signing",
            _as_node(node): "node",
            _as_tls(tls): "tls",
        }
        others = (_as_tls(node), _as_node(tls))
        with self._store.read() as session:
            self._invitation(session, site, token, authority.sha256)
            _require_proofs(proofs, node, token=token, csr=csr_pem, signing=signing_key, node=sent)
            self._require_fresh(session, site, keys, others)
            known = session.get(SiteRow, site)
            node_id = known.node_id if known is not None and known.node_public_key == node_key else ""
            replaced = known.node_id if known is not None and known.node_public_key != node_key else ""
        if not node_id:
            node_id = flower.register_node(node_key, site) or ""
            if not node_id:
                # An earlier attempt ended between Flower's registration and our commit; the key is this site's own.
                flower.want_rebuild()
        now = time.time()
        with self._store.write() as session:
            invitation = self._invitation(session, site, token, authority.sha256)
            self._require_fresh(session, site, keys, others)
            invitation.used_at = now
            for row in session.scalars(select(SiteKeyRow).where(SiteKeyRow.site == site)):
                if row.kind != "signing" and row.fingerprint not in keys:
                    row.retired_at = row.retired_at or now
            self._keep(session, site, keys)
            enrolled = session.get_one(SiteRow, site)
            enrolled.state = "enrolled"
            enrolled.signing_key, enrolled.node_public_key = signing_key, node_key
            enrolled.node_key_fingerprint, enrolled.node_id = node_key_fingerprint(node_key), node_id
            enrolled.certificate_fingerprint = fingerprint(certificate)
            enrolled.certificate_expires_at = certificate.not_valid_after_utc.timestamp()
            enrolled.next_fingerprint, enrolled.next_expires_at = "", 0.0
            enrolled.enrolled_at, enrolled.revoked_at, enrolled.node_seen_at = now, 0.0, 0.0
            # Its agent announces them again.
            enrolled.base_model, enrolled.base_targets, enrolled.base_announced_at = "", "", 0.0
            enrolled.orders = 0
            session.add(EventRow(at=now, kind="site-enrolled", site=site))
        if replaced and replaced != node_id:
            flower.unregister_node(replaced)
        return Enrolled(certificate.public_bytes(serialization.Encoding.PEM).decode("ascii"))

    @staticmethod
    def _require_fresh(session: Session, site: str, keys: dict[str, str], others: tuple[str, ...]) -> None:
        """EnrolmentError when a key (SHA-256 to kind) is another site's, or was revoked or replaced.

        `others`: the same keys as keys of the other kind, which none of them may be or have been.
        """
        if any(other in keys or session.get(SiteKeyRow, other) is not None for other in others):
            raise EnrolmentError(
                "one of the keys is, or was, a key of another kind",
                fix="make new keys: `fl-client enroll --force`, which keeps the ledger and its key",
                code="key-taken",
            )
        for key_digest, kind in keys.items():
            row = session.get(SiteKeyRow, key_digest)
            if row is not None and (row.site, row.kind) != (site, kind):
                raise EnrolmentError(
                    "one of the keys belongs to another site",
                    fix="make new keys: enrol in a fresh home",
                    code="key-taken",
                )
            if row is not None and row.retired_at:
                raise EnrolmentError(
                    f"the {kind} key was revoked or replaced, and is never accepted again",
                    fix="make a new one: `fl-client enroll --force`, which keeps the ledger and its key",
                    code="key-revoked",
                )

    @staticmethod
    def _keep(session: Session, site: str, keys: dict[str, str]) -> None:
        for key_digest, kind in keys.items():
            if session.get(SiteKeyRow, key_digest) is None:
                session.add(SiteKeyRow(fingerprint=key_digest, kind=kind, site=site, proved_at=time.time()))

    def moved(self, site: str, node_key: str, node_id: str) -> None:
        """Note the id under which the SuperLink knows a site's node key from now on."""
        with self._store.write() as session:
            row = session.get_one(SiteRow, site)
            if row.state == "enrolled" and row.node_public_key == node_key:
                row.node_id = node_id
                session.add(EventRow(at=time.time(), kind="node-registered", site=site, message=f"as {node_id}"))

    def authorise(self, who: Identity) -> SiteRow:
        """The enrolled site behind a verified certificate; EnrolmentError when revoked, replaced or expired.

        Read on every request, so a revocation takes effect on the next one.
        """
        with self._store.read() as session:
            row = session.get(SiteRow, who.name)
        if who.role != "site" or row is None or who.fingerprint not in _valid(row):
            raise EnrolmentError(
                f"the certificate of {who.name} is not valid here", fix=_NEW_INVITATION, code="not-authorised"
            )
        if who.expires_at < time.time():
            raise EnrolmentError(f"the certificate of {who.name} has expired", fix=_NEW_INVITATION, code="expired")
        return self._activate(who) if who.fingerprint == row.next_fingerprint else row

    def _activate(self, who: Identity) -> SiteRow:
        """The first use of a renewed certificate: the one before it ends."""
        with self._store.write() as session:
            row = session.get_one(SiteRow, who.name)
            if who.fingerprint == row.next_fingerprint:
                row.certificate_fingerprint, row.certificate_expires_at = row.next_fingerprint, row.next_expires_at
                row.next_fingerprint, row.next_expires_at = "", 0.0
                session.add(EventRow(at=time.time(), kind="certificate-taken-up", site=who.name))
        return row

    def renew(self, who: Identity, csr_pem: str, authority: Authority, days: float) -> str:
        """Certify a new key of an enrolled site; PEM. A second request before the first answer's use replaces it.

        Raises:
            EnrolmentError: the certificate that asks is not valid (any more), or the request is not.
        """
        self.authorise(who)
        certificate = authority.sign_request(csr_pem, "site", who.name, days)
        keys, others = {_as_tls(certificate.public_key()): "tls"}, (_as_node(certificate.public_key()),)
        with self._store.write() as session:
            self._require_fresh(session, who.name, keys, others)
            self._keep(session, who.name, keys)
            row = session.get_one(SiteRow, who.name)
            if who.fingerprint not in _valid(row):
                raise EnrolmentError(
                    f"the certificate of {who.name} is not valid here", fix=_NEW_INVITATION, code="not-authorised"
                )
            row.next_fingerprint = fingerprint(certificate)
            row.next_expires_at = certificate.not_valid_after_utc.timestamp()
            session.add(EventRow(at=time.time(), kind="certificate-renewed", site=who.name))
        return certificate.public_bytes(serialization.Encoding.PEM).decode("ascii")

    def seen(self, site: str) -> None:
        """Note that the site spoke just now."""
        with self._store.write() as session:
            session.get_one(SiteRow, site).last_seen_at = time.time()

    def node_seen(self, site: str, *, online: bool) -> None:
        """Note that the SuperLink accepted a call of the site's node just now; or refused one, or let it go."""
        with self._store.write() as session:
            session.get_one(SiteRow, site).node_seen_at = time.time() if online else 0.0

    def announce(self, site: str, base: BaseModel, orders: int = 0) -> None:
        """Keep the base model that the site says it has, and the newest orders it reads, in place of what it said."""
        with self._store.write() as session:
            row = session.get_one(SiteRow, site)
            row.base_model, row.base_targets = base.digest, ",".join(base.targets)
            row.base_announced_at, row.orders = time.time(), orders

    def all(self) -> list[SiteRow]:
        """Every site, by name."""
        with self._store.read() as session:
            return list(session.scalars(select(SiteRow).order_by(SiteRow.site)))

    def get(self, site: str) -> SiteRow:
        """One site; ConfigError when there is none of that name."""
        with self._store.read() as session:
            row = session.get(SiteRow, site)
        if row is None:
            raise ConfigError(f"there is no site {site!r}", fix="see `fl-admin sites list`")
        return row

    def revoke(self, site: str, flower: Flower) -> SiteRow:
        """Shut a site out from its next request on, and forbid its node at Flower."""
        self.get(site)
        with self._store.write() as session:
            row = session.get_one(SiteRow, site)
            if row.state != "revoked":
                row.state, row.revoked_at = "revoked", time.time()
                row.next_fingerprint, row.next_expires_at = "", 0.0
                session.add(EventRow(at=row.revoked_at, kind="site-revoked", site=site))
                for key in session.scalars(select(SiteKeyRow).where(SiteKeyRow.site == site)):
                    if key.kind != "signing":
                        key.retired_at = key.retired_at or row.revoked_at
            for invitation in session.scalars(select(InvitationRow).where(InvitationRow.site == site)):
                if not invitation.used_at:
                    session.delete(invitation)
            node = row.node_id
        if node:
            flower.unregister_node(node)
        return self.get(site)
