"""Speak to the coordinator's gateway with the site's certificate: who am I, which keys are yours."""

from __future__ import annotations

from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_client.enrolment import Coordinator, verified_context
from fl_client.home import SiteHome
from fl_shared.errors import EnrolmentError, TransportError
from fl_shared.hosts import by_proxy

TIMEOUT_S = 15.0
MAX_ANSWER_BYTES = 1 << 20
PASSING = (408, 429, 502, 503, 504)
"""Answers that say nothing about the certificate: too slow, too often, not ready."""


def say_hello(home: SiteHome, pinned: Coordinator) -> dict[str, Any]:
    """Ask `GET /v1/hello` with the site's certificate; TransportError or EnrolmentError otherwise."""
    return call(home, pinned, "GET", "/v1/hello")


def call(
    home: SiteHome, pinned: Coordinator, method: str, path: str, body: dict[str, Any] | None = None
) -> dict[str, Any]:
    """One call of the gateway under mutual TLS 1.3; the JSON object that it answers.

    Honours HTTPS_PROXY, but not to this machine itself. Raises TransportError when no answer came, EnrolmentError
    when the certificate cannot be used or is refused.
    """
    url = f"{pinned.server}{path}"
    try:
        load_pem_private_key(home.client_key.read_bytes(), None)
        context = verified_context(home.ca.read_text("ascii"), home.client_certificate, home.client_key)
    except (OSError, ValueError) as error:
        raise EnrolmentError(
            f"the client certificate cannot be used: {error}", fix="enrol again with a new token and --force"
        ) from None
    try:
        with httpx.Client(verify=context, timeout=TIMEOUT_S, trust_env=by_proxy(url)) as client:
            answer = client.request(method, url, json=body)
        if len(answer.content) > MAX_ANSWER_BYTES:
            raise TransportError(f"the answer of {url} is too large", fix="check that [server] url is the gateway")
        found = answer.json()
    except (httpx.HTTPError, ValueError) as error:
        raise TransportError(
            f"no answer from {url}: {error or type(error).__name__}",
            fix="check the network and that the coordinator runs (`fl-server status`)",
        ) from None
    if answer.status_code != 200 or not isinstance(found, dict):
        said = str(found.get("error", "")) if isinstance(found, dict) else ""
        if answer.status_code in PASSING:
            raise TransportError(f"the coordinator cannot answer just now: {said[:300]}", fix="try again in a minute")
        raise EnrolmentError(
            f"the coordinator refuses this certificate: {said[:300] or answer.status_code}",
            fix="ask the coordinator's administrator whether the site was revoked; enrol again with --force",
        )
    return found
