"""Renew the site's certificate before it expires, without a person.

The agent looks every few hours; when less than a third of the certificate's life is left it makes a new key,
sends a signing request over the connection that the old certificate secures (`POST /v1/renew`) and puts the
answer in place. The coordinator accepts the old certificate until the new one was used once, so that an
answer that is lost on the way costs nothing.

Two files cannot be replaced at once. The new key waits in `tls/next.key`, the certificate is replaced first,
and `finish` completes the exchange after a crash in between.
"""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from fl_client.identity.enrolment import Coordinator, new_ec_key
from fl_client.identity.gateway import GatewayClient
from fl_client.site.home import SiteHome
from fl_shared.errors import ConcordatError, EnrolmentError
from fl_shared.files import sync_directory, write_durably
from fl_shared.identity.x509 import issued, signing_request
from fl_shared.runtime.threads import Loop

log = logging.getLogger("fl_client.identity.renewal")

EVERY_S = 4 * 3600.0
RETRY_S = 600.0
DUE_SHARE = 1 / 3


def certificate(home: SiteHome) -> x509.Certificate:
    """The site's certificate; EnrolmentError when it cannot be read."""
    try:
        return x509.load_pem_x509_certificate(home.client_certificate.read_bytes())
    except (OSError, ValueError) as error:
        raise EnrolmentError(
            f"{home.client_certificate} cannot be read ({type(error).__name__})",
            fix="enrol again with a new token and --force",
        ) from None


def due(current: x509.Certificate, now: datetime) -> bool:
    """Whether less than a third of the certificate's life is left."""
    life: timedelta = current.not_valid_after_utc - current.not_valid_before_utc
    return current.not_valid_after_utc - now < life * DUE_SHARE


def renew(home: SiteHome, pinned: Coordinator) -> x509.Certificate:
    """Get a certificate for a new key and put both in place.

    Raises TransportError, or EnrolmentError when the coordinator refuses or its answer is wrong; then nothing
    but `tls/next.key` has changed, and the next attempt uses that key again.
    """
    finish(home)
    next_key = _next(home)
    if not next_key.exists():
        write_durably(next_key, new_ec_key())
    key = _load(next_key)
    body = {"csr_pem": signing_request(key, pinned.site, "site")}
    answer = GatewayClient.of_site(home, pinned.server).call("POST", "/v1/renew", body)
    text = str(answer.get("certificate_pem"))
    fix = "report this to the coordinator's administrator; the old certificate stays in use"
    renewed = issued(text, ca_pem=home.ca.read_text("ascii"), key=key.public_key(), name=pinned.site, fix=fix)
    write_durably(home.client_certificate, text.encode("ascii"))
    finish(home)
    return renewed


def finish(home: SiteHome) -> None:
    """Complete an exchange that a crash broke off between certificate and key."""
    next_key = _next(home)
    if not next_key.exists():
        return
    if certificate(home).public_key() == _load(next_key).public_key():
        next_key.rename(home.client_key)
        sync_directory(home.tls)


def _next(home: SiteHome) -> Path:
    return home.tls / "next.key"


def _load(path: Path) -> ec.EllipticCurvePrivateKey:
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise EnrolmentError(f"{path} cannot be read ({type(error).__name__})", fix=f"delete {path}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise EnrolmentError(f"{path} is not an EC key", fix=f"delete {path}")
    return key


class Renewer:
    """A thread of the agent that renews in time. Whoever uses the certificate reads it again for each connection."""

    def __init__(self, home: SiteHome, pinned: Coordinator) -> None:
        """Take the site's home and whom to ask."""
        self._home = home
        self._pinned = pinned
        self.loop = Loop("the renewal of the certificate", lambda: self.look(), most_pause_s=RETRY_S)

    def start(self) -> None:
        """Look now, and then every few hours."""
        self.loop.start()

    def stop(self) -> None:
        """End the thread; a request in progress is not waited for longer than a second."""
        self.loop.stop()

    def look(self) -> float:
        """Renew if it is time; return the seconds until the next look."""
        try:
            current = certificate(self._home)
            if not due(current, datetime.now(UTC)):
                return EVERY_S
            renewed = renew(self._home, self._pinned)
        except ConcordatError as error:
            log.warning("the certificate was not renewed: %s; trying again in %.0f min", error.message, RETRY_S / 60)
            return RETRY_S
        log.info("renewed the certificate; valid until %s", f"{renewed.not_valid_after_utc:%Y-%m-%d}")
        return EVERY_S
