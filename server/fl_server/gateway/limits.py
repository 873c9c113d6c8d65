"""How large a request may be and how long it may take: bodies that are read in time, answers that are taken in time.

What may be open and asked at once is counted elsewhere (`fl_server.gateway.connections`, `fl_shared.runtime.limits`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, MutableMapping
from typing import Any, TypeVar

from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from fl_shared.canonical import parse_json
from fl_shared.errors import ConcordatError, ConfigError, TransportError

log = logging.getLogger("fl_server.gateway.app")

BODY_IDLE_S, SEND_IDLE_S = 20.0, 60.0
LEAST_BYTES_PER_S, PATIENCE_S = 1024.0, 30.0

T = TypeVar("T")
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class Refused(Exception):
    """Ends a request with a typed answer."""

    def __init__(self, error: ConcordatError, status: int) -> None:
        super().__init__(error.message)
        self.error = error
        self.status = status


def refusal(error: ConcordatError, status: int) -> JSONResponse:
    headers = {"retry-after": "1"} if status in (429, 503) else None
    return JSONResponse(error.to_dict(), status_code=status, headers=headers)


async def body_blocks(request: Request, limit: int) -> AsyncIterator[bytes]:
    """The body as it comes. Refused: more than `limit` bytes, a pause of `BODY_IDLE_S`, or a trickle."""
    too_slow = Refused(TransportError("the request comes too slowly", fix="send it again", code="too-slow"), 408)
    too_large = Refused(
        TransportError(f"the request is larger than {limit} bytes", fix="send less", code="too-large"), 413
    )
    if int(request.headers.get("content-length", "0")) > limit:
        raise too_large
    stream = aiter(request.stream())
    received, waited = 0, 0.0
    while True:
        began = time.monotonic()
        try:
            async with asyncio.timeout(BODY_IDLE_S):
                block = await anext(stream)
        except StopAsyncIteration:
            return
        except TimeoutError:
            raise too_slow from None
        # Only what the client makes us wait for is added: the SuperLink may be slow, too.
        waited += time.monotonic() - began
        received += len(block)
        if received > limit:
            raise too_large
        if waited > PATIENCE_S and received < waited * LEAST_BYTES_PER_S:
            raise too_slow
        yield block


async def read_body(request: Request, limit: int) -> bytes:
    return b"".join([block async for block in body_blocks(request, limit)])


async def read_json(request: Request, limit: int, read: Callable[[Any], T], otherwise: ConcordatError) -> T:
    """The JSON body, at most `limit` bytes, as `read` makes it.

    Raises:
        Refused: status 400, with what `read` says of it, or with `otherwise` when it is not of the agreed form.
    """
    try:
        document = parse_json(await read_body(request, limit), "the request")
    except ConfigError as error:
        raise Refused(otherwise, 400) from error
    try:
        return read(document)
    except ConcordatError as error:
        raise Refused(error, 400) from error
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(otherwise, 400) from error


class Requests:
    """Watches over whole requests: what was taken for one is given back at its end, and no answer waits for ever.

    `request.state.at_end` is the stack of what to give back; it ends after the answer's last byte.
    """

    def __init__(self, app: Starlette) -> None:
        self._app = app
        app.router.redirect_slashes = False  # a redirect would name the host that the client made up

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass every part of an answer on within `SEND_IDLE_S`; no request that two readers could read in two ways."""
        scope["path"] = scope["raw_path"].decode("latin-1")  # as it came: `/v1%2Fca` is not `/v1/ca`
        names = [name for name, _ in scope["headers"]]
        if len(set(names)) != len(names) or {b"content-length", b"transfer-encoding"} <= set(names):
            twice = TransportError("a header is there twice, or the length in two ways", code="bad-request")
            answer = refusal(twice, 400)
            answer.headers["connection"] = "close"
            await answer(scope, receive, send)
            return

        async def timely(message: Message) -> None:
            try:
                async with asyncio.timeout(SEND_IDLE_S):
                    await send(message)
            except TimeoutError:
                log.warning("a client did not take its answer")
                scope["state"]["abort"]()
                raise ClientDisconnect from None

        with contextlib.suppress(ClientDisconnect):
            async with contextlib.AsyncExitStack() as at_end:
                scope["state"]["at_end"] = at_end
                await self._app(scope, receive, timely)
