"""One HTTPS request to the coordinator's gateway, whose answer can fill neither memory nor time.

The coordinator may be hostile, and before enrolment anybody may stand in between. So an answer is read as it travels
(nothing is inflated), to a limit, for a while; and it is JSON that every reader reads alike.
"""

from __future__ import annotations

import ssl
import time
from typing import Any

import httpx

from fl_shared.canonical import parse_json
from fl_shared.errors import ConcordatError, ConfigError, TransportError
from fl_shared.wire.hosts import by_proxy

MAX_ANSWER_BYTES = 1 << 20
PATIENCE_S = 60.0
PASSING = (408, 429, 502, 503, 504)
"""Answers that say nothing about certificate or token: too slow, too often, not ready."""


def ask(
    method: str, url: str, context: ssl.SSLContext, body: dict[str, Any] | None = None, *, timeout: httpx.Timeout
) -> tuple[int, bytes]:
    """Status and body of the answer. Honours HTTPS_PROXY, but not to this machine itself.

    Raises:
        TransportError: none came, one of more than `MAX_ANSWER_BYTES`, or one that took longer than `PATIENCE_S`.
    """
    try:
        with (
            httpx.Client(
                verify=context, timeout=timeout, trust_env=by_proxy(url), headers={"accept-encoding": "identity"}
            ) as client,
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


def refusal(url: str, status: int, body: Any, *, fix: str) -> ConcordatError:
    """What the gateway refused with, of the class that it was there; `fix` stands where it gives none."""
    try:
        return ConcordatError.from_dict(body)
    except ValueError:
        return ConcordatError(f"{url} answered with status {status}", fix=fix)


def read(url: str, body: bytes) -> Any:
    """The JSON document in an answer; TransportError when it is none."""
    try:
        return parse_json(body, f"the answer of {url}")
    except ConfigError as error:
        raise TransportError(error.message, fix="check that it is the gateway's URL") from None
