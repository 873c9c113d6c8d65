"""HTTPS to the coordinator's gateway, whose answers can fill neither memory nor time.

The coordinator may be hostile, and before enrolment anybody may stand in between. So an answer is read as it travels
(nothing is inflated), to a limit, for a while; and it is JSON that every reader reads alike.
"""

from __future__ import annotations

import ssl
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
from cryptography.hazmat.primitives.serialization import load_pem_private_key

from fl_client.site.home import SiteHome
from fl_shared.canonical import parse_json
from fl_shared.documents.order import BY_DIGEST, ORDERS_HEADER
from fl_shared.errors import ConcordatError, ConfigError, EnrolmentError, TransportError
from fl_shared.wire.hosts import by_proxy

MAX_ANSWER_BYTES = 1 << 20
PATIENCE_S = 60.0
PASSING = (408, 429, 502, 503, 504)
"""Answers that say nothing about certificate or token: too slow, too often, not ready."""
TIMEOUT = httpx.Timeout(15.0)
ENROLMENT_TIMEOUT = httpx.Timeout(30.0, connect=10.0)
HEADERS = {"accept-encoding": "identity", ORDERS_HEADER: str(BY_DIGEST)}
"""Of every call. The coordinator keeps which orders this version reads with the announcement of the base model."""


class GatewayClient:
    """The gateway at one address. Every call reads what proves the site again: a certificate may have been renewed."""

    def __init__(self, server: str, context: Callable[[], ssl.SSLContext], *, enrolled: bool = False) -> None:
        """Take `https://HOST:PORT` and what TLS to it must satisfy; `enrolled`: with the site's certificate."""
        self._server = server
        self._context = context
        self._enrolled = enrolled

    @classmethod
    def before_enrolment(cls, server: str, context: ssl.SSLContext) -> GatewayClient:
        """For a site that has no certificate yet."""
        return cls(server, lambda: context)

    @classmethod
    def of_site(cls, home: SiteHome, server: str) -> GatewayClient:
        """For an enrolled site: TLS 1.3 on both sides, by the CA that was pinned and the site's certificate."""
        return cls(server, lambda: _site_context(home), enrolled=True)

    def hello(self) -> dict[str, Any]:
        """`GET /v1/hello`: whom the gateway takes this site for, the coordinator's keys, the time. Raises as `call`."""
        return self.call("GET", "/v1/hello")

    def call(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        """The JSON object that answers one call.

        Raises:
            TransportError: no usable answer came.
            EnrolmentError: token or certificate is refused, or cannot be used.
        """
        url = f"{self._server}{path}"
        answer = _read(url, self.fetch(method, path, body))
        if not isinstance(answer, dict):
            raise EnrolmentError(f"the answer of {url} is not a JSON object", fix="check that it is the gateway's URL")
        return answer

    def fetch(self, method: str, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The body that answers one call, whatever its form. Raises as `call`."""
        url = f"{self._server}{path}"
        context = self._context()
        status, answer = _ask(method, url, context, body, timeout=TIMEOUT if self._enrolled else ENROLMENT_TIMEOUT)
        if status != 200:
            raise self._refusal(url, status, answer)
        return answer

    def _refusal(self, url: str, status: int, answer: bytes) -> ConcordatError:
        """What the gateway's `{error, code, fix}` means: TransportError when it may pass, EnrolmentError otherwise."""
        try:
            body = _read(url, answer)
        except TransportError as error:
            if self._enrolled:
                return error  # somebody else's words
            body = None
        try:
            refusal = ConcordatError.from_dict(body)
        except ValueError:
            refusal = ConcordatError(f"{url} answered with status {status}", code="no-answer")
        message, fix = refusal.message[:500], refusal.fix[:500]
        if status in PASSING:
            fix = fix or "try again in a minute"
            return TransportError(f"the coordinator cannot answer just now: {message}", fix=fix, code=refusal.code)
        if self._enrolled:
            return EnrolmentError(
                f"the coordinator refuses this certificate: {message}",
                fix="ask the coordinator's administrator whether the site was revoked; enrol again with --force",
                code=refusal.code,
            )
        fix = fix or "ask the coordinator's administrator for a new token"
        return EnrolmentError(f"the coordinator refused: {message}", fix=fix, code=refusal.code)


def verified_context(ca_pem: str, certificate: Path | None = None, key: Path | None = None) -> ssl.SSLContext:
    """A TLS 1.3 client context that trusts `ca_pem` alone, with the client certificate if given."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_verify_locations(cadata=ca_pem)
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


def unverified_context() -> ssl.SSLContext:
    """A TLS 1.3 client context that trusts anybody: for the one answer that a token's hash vouches for."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


def _site_context(home: SiteHome) -> ssl.SSLContext:
    try:
        load_pem_private_key(home.client_key.read_bytes(), None)
        return verified_context(home.ca.read_text("ascii"), home.client_certificate, home.client_key)
    except (OSError, ValueError) as error:
        raise EnrolmentError(
            f"the client certificate cannot be used: {error}", fix="enrol again with a new token and --force"
        ) from None


def _ask(
    method: str, url: str, context: ssl.SSLContext, body: dict[str, Any] | None, *, timeout: httpx.Timeout
) -> tuple[int, bytes]:
    """Status and body of the answer. Honours HTTPS_PROXY, but not to this machine itself.

    Raises:
        TransportError: none came, one of more than `MAX_ANSWER_BYTES`, or one that took longer than `PATIENCE_S`.
    """
    try:
        with (
            httpx.Client(verify=context, timeout=timeout, trust_env=by_proxy(url), headers=HEADERS) as client,
            client.stream(method, url, json=body) as answer,
        ):
            until, whole = time.monotonic() + PATIENCE_S, bytearray()
            for block in answer.iter_raw():
                whole += block
                if len(whole) > MAX_ANSWER_BYTES:
                    raise TransportError(f"the answer of {url} is too large", fix="check that it is the gateway's URL")
                if time.monotonic() > until:
                    raise TransportError(f"the answer of {url} comes too slowly", fix="check the network")
            return answer.status_code, bytes(whole)
    except httpx.HTTPError as error:
        raise TransportError(
            f"no answer from {url}: {error or type(error).__name__}",
            fix="check the address, the network and that the coordinator runs (`fl-server status`)",
        ) from None


def _read(url: str, body: bytes) -> Any:
    """The JSON document in an answer; TransportError when it is none."""
    try:
        return parse_json(body, f"the answer of {url}")
    except ConfigError as error:
        raise TransportError(error.message, fix="check that it is the gateway's URL") from None
