"""Speak to the coordinator's gateway with the site's certificate: who am I, which keys are yours."""

from __future__ import annotations

from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_client.identity.enrolment import Coordinator, verified_context
from fl_client.identity.gateway_client import PASSING, ask, read, refusal
from fl_client.site.home import SiteHome
from fl_shared.errors import EnrolmentError, TransportError

TIMEOUT = httpx.Timeout(15.0)


def say_hello(home: SiteHome, pinned: Coordinator) -> dict[str, Any]:
    """Ask `GET /v1/hello` with the site's certificate; TransportError or EnrolmentError otherwise."""
    return call(home, pinned, "GET", "/v1/hello")


def call(
    home: SiteHome, pinned: Coordinator, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One call of the gateway under mutual TLS 1.3; the JSON object that it answers.

    Raises TransportError when no usable answer came, EnrolmentError when the certificate cannot be used or is refused.
    """
    url = f"{pinned.server}{path}"
    try:
        load_pem_private_key(home.client_key.read_bytes(), None)
        context = verified_context(home.ca.read_text("ascii"), home.client_certificate, home.client_key)
    except (OSError, ValueError) as error:
        raise EnrolmentError(
            f"the client certificate cannot be used: {error}", fix="enrol again with a new token and --force"
        ) from None
    status, raw = ask(method, url, context, body, timeout=TIMEOUT)
    found = read(url, raw)
    if status != 200 or not isinstance(found, dict):
        said = refusal(url, status, found, fix="")
        message, code = said.message[:300], said.code
        if status in PASSING:
            fix = "try again in a minute"
            raise TransportError(f"the coordinator cannot answer just now: {message}", fix=fix, code=code)
        raise EnrolmentError(
            f"the coordinator refuses this certificate: {message}",
            fix="ask the coordinator's administrator whether the site was revoked; enrol again with --force",
            code=code,
        )
    return found
