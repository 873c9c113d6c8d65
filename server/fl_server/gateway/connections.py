"""Connection limits: counted by address until they show a certificate, by site from then on, never for ever.

A connection that does not finish its handshake, or a request's head, in time is closed; so is one more than an
address or a site may have open. Whoever holds many connections open, or sends a byte a minute, uses up its own
limits and nobody else's.
"""

from __future__ import annotations

import asyncio
import logging
import re
import socket
import ssl
from dataclasses import dataclass, field

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from fl_server.identity.authority import Identity, identity
from fl_shared.errors import ConfigError, EnrolmentError
from fl_shared.runtime.limits import ConcurrencyLimit, network

log = logging.getLogger("fl_server.gateway.app")

HANDSHAKE_S = 10.0
HEAD_S = 15.0
CLOSING_S = 5.0
MAX_CONNECTIONS = 4096
FILES = 2 * MAX_CONNECTIONS + 256
"""Descriptors that the gateway needs with all of its connections open."""
MAX_FOR_AN_ADDRESS = 32
MAX_FOR_A_SITE = 64
# Control characters, a line feed or carriage return alone, a folded line.
_UNFIT = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n|\r(?!\n|\Z)|\r\n[ \t]")


@dataclass
class ConnectionLimits:
    """How many connections are open just now."""

    everybody: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(MAX_CONNECTIONS))
    addresses: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(MAX_FOR_AN_ADDRESS))
    sites: ConcurrencyLimit = field(default_factory=lambda: ConcurrencyLimit(MAX_FOR_A_SITE))


class Slot:
    """What one connection takes of the limits: of its address's, and of its site's instead once that is known."""

    def __init__(self, limits: ConnectionLimits, address: str) -> None:
        self._limits = limits
        self._address = network(address)
        self._site = ""
        self._released = False

    def acquire(self) -> bool:
        """Take the slot; False when there is none."""
        if not self._limits.everybody.acquire(""):
            return False
        if not self._limits.addresses.acquire(self._address):
            self._limits.everybody.release("")
            return False
        return True

    def identified(self, site: str) -> bool:
        """Change the address's slot for one of the site; False when there is none."""
        if not self._limits.sites.acquire(site):
            return False
        self._limits.addresses.release(self._address)
        self._site = site
        return True

    def release(self) -> None:
        """Give the slot back; once."""
        if self._released:
            return
        self._released = True
        self._limits.everybody.release("")
        if self._site:
            self._limits.sites.release(self._site)
        else:
            self._limits.addresses.release(self._address)


class Connection(H11Protocol):
    """uvicorn's HTTP/1.1 protocol with a deadline for a request's head.

    Puts into the scope's state `who`, the identity in the client certificate that TLS has verified (or None), and
    `abort`, which ends the connection at once.
    """

    def __init__(self, slot: Slot, config: uvicorn.Config, state: ServerState) -> None:
        super().__init__(config, state, {})
        self._slot = slot
        self._deadline: asyncio.TimerHandle | None = None
        self._tail = b""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # uvicorn's type
        """After the handshake."""
        super().connection_made(transport)
        who = _identity(transport)
        self.app_state = {"who": who, "abort": transport.abort}
        if who is not None and not self._slot.identified(f"{who.role} {who.name}"):
            log.warning("%s has too many connections", who.name)
            transport.abort()
            return
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        """The slot is free again."""
        self._slot.release()
        self._unwatch()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Part of a head or of a body; the application watches over bodies."""
        if self.conn.their_state is h11.IDLE and not self._fit(data):
            self.send_400_response("The request's head is malformed.")
            return
        try:
            super().data_received(data)
        except h11.LocalProtocolError:  # a body went wrong after its answer had begun: there is no 400 any more
            self.transport.abort()
            return
        if self.conn.their_state is h11.DONE and self.conn.trailing_data[0]:
            self.transport.abort()  # another request before the answer to this one: no client of ours does that
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self._unwatch()
        else:
            self._watch()

    def _fit(self, data: bytes) -> bool:
        """Whether these bytes of a head can be read in one way only; h11 itself reads folded lines, too."""
        head = self._tail + data
        end = head.find(b"\r\n\r\n")
        self._tail = b"" if end >= 0 else head[-3:]
        return _UNFIT.search(head[:end] if end >= 0 else head) is None

    def _watch(self) -> None:
        # Not started again with every byte: the whole head must be there in time.
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self._too_slow)

    def _unwatch(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _too_slow(self) -> None:
        self._deadline = None
        if self.cycle is None or self.cycle.response_complete:
            self.transport.abort()


def _identity(transport: asyncio.BaseTransport) -> Identity | None:
    tls = transport.get_extra_info("ssl_object")
    der = tls.getpeercert(True) if tls is not None else None
    if not der:
        return None
    try:
        return identity(der)
    except EnrolmentError as error:
        log.warning("a certificate of ours that names nobody: %s", error.message)
        return None


def listener(host: str, port: int) -> socket.socket:
    """A listening socket; ConfigError when the address cannot be used."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        listening = socket.create_server((host, port), family=addresses[0][0], backlog=512)
    except OSError as error:
        raise ConfigError(
            f"[server] listen: {host}:{port} cannot be used: {error}", fix="free the port, or correct listen"
        ) from error
    listening.setblocking(False)
    return listening


async def serve(server: uvicorn.Server, tls: ssl.SSLContext, listening: socket.socket) -> None:
    """Serve until SIGTERM. uvicorn runs the application; the connections are made here."""
    loop = asyncio.get_running_loop()
    limits = ConnectionLimits()
    handshakes: set[asyncio.Task[None]] = set()
    serving = asyncio.create_task(server.serve(sockets=[]))

    async def handshake(arrived: socket.socket, slot: Slot) -> None:
        try:
            await loop.connect_accepted_socket(
                lambda: Connection(slot, server.config, server.server_state),
                arrived,
                ssl=tls,
                ssl_handshake_timeout=HANDSHAKE_S,
                ssl_shutdown_timeout=CLOSING_S,
            )
        except (OSError, asyncio.CancelledError):  # a failed or late handshake is an OSError, too
            slot.release()

    async def admit() -> None:
        while not server.should_exit:
            try:
                arrived, address = await loop.sock_accept(listening)
            except OSError as error:
                log.error("cannot accept a connection: %s", error)
                await asyncio.sleep(0.5)
                continue
            slot = Slot(limits, str(address[0]))
            if not slot.acquire():
                arrived.close()
                continue
            task = asyncio.create_task(handshake(arrived, slot))
            handshakes.add(task)
            task.add_done_callback(handshakes.discard)

    admitting = asyncio.create_task(admit())
    # Without it no connection is let in: the process ends then, and the supervisor starts another.
    admitting.add_done_callback(lambda _: setattr(server, "should_exit", True))
    try:
        await serving
        if admitting.done() and not admitting.cancelled() and (error := admitting.exception()):
            raise error
    finally:
        for task in (admitting, *handshakes):
            task.cancel()
        await asyncio.gather(admitting, *handshakes, return_exceptions=True)
        listening.close()
