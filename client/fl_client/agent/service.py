"""The agent's gRPC service on a Unix socket: the only thing the untrusted half can talk to."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc

from fl_client.agent.outgoing import Sealed, chunks
from fl_client.agent.rounds import Rounds, Stopping
from fl_client.metrics.site import Metrics
from fl_shared import __version__
from fl_shared.adapters.safetensors import MAX_BYTES
from fl_shared.errors import ConcordatError, ConfigError
from fl_shared.files import check_grpc_socket, socket_address
from fl_shared.runtime.threads import running_pool
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import Chunk, InfoReply, InfoRequest, RoundHeader
from fl_shared.wire.chunks import join

log = logging.getLogger("fl_client.agent")

_MAX_MESSAGE = (8 << 20) + (1 << 16)  # one header: an order and its spec; or one data chunk of 1 MiB


class AgentService(agent_pb2_grpc.AgentServicer):  # type: ignore[misc]  # generated, without types
    """Receives rounds in chunks and streams replies back."""

    def __init__(
        self,
        site: str,
        rounds: Rounds,
        metrics: Metrics | None = None,
        problems: Callable[[], list[str]] = list,
    ) -> None:
        """Answer for `site` with `rounds`, counting into `metrics`; `problems` says what does not run."""
        self._site = site
        self._rounds = rounds
        self._metrics = metrics or Metrics()
        self._problems = problems

    def Round(self, request_iterator: Iterator[Chunk], context: grpc.ServicerContext) -> Iterator[Chunk]:  # noqa: N802
        """One round: header and adapter in, reply and update out."""
        began = time.monotonic()
        try:
            first = next(request_iterator, None)
            if first is None or first.WhichOneof("part") != "header":
                raise ConfigError("the first chunk must be the header", fix="send the header, then data")
            sealed, size = self._answered(first.header, request_iterator)
        except Stopping as error:
            context.abort(grpc.StatusCode.UNAVAILABLE, error.message)
        except ConcordatError as error:
            log.warning("a round was not answered: %s", error.message)
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, error.message[:300])
        except grpc.RpcError:
            raise  # the caller went away
        except Exception:  # gRPC would send the words of whatever it is, which may quote files and data
            log.exception("a round ended in a defect")
            context.abort(grpc.StatusCode.INTERNAL, "the site cannot answer this round; see the site's own log")
        self._metrics.round(sealed.outcome, time.monotonic() - began, size, len(sealed.payload))
        yield from chunks(sealed)

    def _answered(self, header: RoundHeader, chunks_: Iterator[Chunk]) -> tuple[Sealed, int]:
        """The answer to an order, and how large an adapter was taken into memory for it."""
        size = 0

        def adapter() -> bytes:
            nonlocal size
            size = header.adapter_bytes
            return join(
                (_data(chunk) for chunk in chunks_),
                expected_bytes=header.adapter_bytes,
                expected_digest=header.adapter_digest,
                limit=MAX_BYTES,
            )

        sealed = self._rounds.handle(header.manifest_json, adapter, header.spec_json)
        return sealed, size

    def Info(self, request: InfoRequest, context: grpc.ServicerContext) -> InfoReply:  # noqa: ARG002, N802
        """What the untrusted half may know."""
        problems = [problem[:300] for problem in self._problems()]
        return InfoReply(site=self._site, version=__version__, state=self._rounds.state, problems=problems)


def _data(chunk: Chunk) -> bytes:
    if chunk.WhichOneof("part") != "data":
        raise ConfigError("a chunk after the header holds no data", fix="send the header once, then data")
    return bytes(chunk.data)


def serve(service: AgentService, socket: Path, group: str = "") -> grpc.Server:
    """Start the service on `socket` (mode 0600, or 0660 for `group`) and return the server.

    ConfigError when the path cannot be a socket's or the group is unknown.
    """
    check_grpc_socket(socket, fix="name another [supernode] socket")
    socket.unlink(missing_ok=True)
    server = grpc.server(
        running_pool(4, "agent"),
        maximum_concurrent_rpcs=4,
        options=[("grpc.max_receive_message_length", _MAX_MESSAGE), ("grpc.so_reuseport", 0)],
    )
    agent_pb2_grpc.add_AgentServicer_to_server(service, server)
    mask = os.umask(0o177)
    try:
        server.add_insecure_port(f"unix:{socket_address(socket)}")
    except RuntimeError:  # all that gRPC says
        raise ConfigError(
            f"the agent's socket {socket} cannot be made",
            fix="see that its directory is there, writable, and its disk not full",
        ) from None
    finally:
        os.umask(mask)
    server.start()
    socket.chmod(0o600)
    if group:
        try:
            shutil.chown(socket, group=group)
            shutil.chown(socket.parent, group=group)
        except (LookupError, PermissionError) as error:
            server.stop(0)
            raise ConfigError(
                f"[supernode] socket_group = {group!r}: {error}",
                fix="create the group and add the agent's user to it",
            ) from None
        socket.chmod(0o660)
        socket.parent.chmod(0o710)
    return server
