"""The invitation token: what an admin hands to an institution, so that its site can enrol once.

`ct1.<site>.<secret>.<sha256 of the CA certificate>`: it names the site, proves that it was invited, and lets it
recognise the coordinator. The coordinator keeps no more of the secret than its SHA-256.
"""

from __future__ import annotations

import base64
import hashlib
import re
import secrets
from dataclasses import dataclass, field

from fl_shared.errors import ConfigError, EnrolmentError
from fl_shared.names import site_id

SECRET_BYTES = 24
_FORM = re.compile(r"ct1\.([a-z0-9-]{1,63})\.([A-Za-z0-9_-]{32})\.([0-9a-f]{64})")


@dataclass(frozen=True)
class Token:
    """One invitation: whose it is, its secret (192 bits, base64url) and the CA certificate's SHA-256 (hex)."""

    site: str
    secret: str = field(repr=False)
    ca_sha256: str

    @classmethod
    def new(cls, site: str, ca_sha256: str) -> Token:
        """A token for `site` with a new secret from the operating system's random source."""
        secret = base64.urlsafe_b64encode(secrets.token_bytes(SECRET_BYTES)).decode("ascii")
        return cls(site, secret, ca_sha256)

    @classmethod
    def parse(cls, text: str) -> Token:
        """Read a token's text; EnrolmentError, which does not show it, when the form is wrong."""
        match = _FORM.fullmatch(text)
        try:
            if match is not None:
                return cls(site_id(match.group(1)), match.group(2), match.group(3))
        except ConfigError:  # the name of no site
            pass
        raise EnrolmentError(
            "the enrolment token is not of the form ct1.<site>.<secret>.<hash>",
            fix="copy the whole token that `fl-admin sites invite` printed, in quotes",
        )

    @property
    def text(self) -> str:
        """The token as it is handed over."""
        return f"ct1.{self.site}.{self.secret}.{self.ca_sha256}"

    @property
    def secret_sha256(self) -> bytes:
        """What the coordinator keeps of it, 32 bytes."""
        return hashlib.sha256(self.secret.encode("ascii")).digest()
