"""Carry one order to a site's agent over its Unix socket and its answer back: bytes in, bytes out, nothing read.

This file travels to the sites with the app, beside `agent_pb2.py`, and imports nothing of ours: which version of
Concordat a site runs does not matter, so long as its agent speaks `concordat.agent.v1` (`fl_shared/wire/agent.proto`;
what may change in it is written there and in docs/decisions/0110). What arrives is checked where it is believed: the
order by the agent, the update's digest by the coordinator, against the signed receipt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator

import grpc

from .agent_pb2 import Chunk, RoundHeader

PROTOCOL = "concordat.agent.v1"
CHUNK_BYTES = 1 << 20
MAX_UPDATE_BYTES = 4 << 30
CONNECT_TIMEOUT_S = 20.0
_OPTIONS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.max_send_message_length", 4 << 20)]


class RelayError(Exception):
    """The agent is not there, speaks another protocol, or its answer is cut off."""


def relay(socket: str, manifest: str, adapter: bytes, timeout_s: float, spec: str = "") -> tuple[str, str, bytes]:
    """Send one order and its adapter to the agent behind `socket`; (status, signed document, update bytes).

    `spec`: the run's spec, for an order that names it by its digest.

    Raises:
        RelayError: the agent is not there, or its answer is not whole.
    """
    with grpc.insecure_channel(f"unix:{socket}", options=_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_TIMEOUT_S)
            answer = channel.stream_stream(
                f"/{PROTOCOL}.Agent/Round",
                request_serializer=Chunk.SerializeToString,
                response_deserializer=Chunk.FromString,
            )(_order(manifest, adapter, spec), timeout=timeout_s)
            return _answer(answer)
        except grpc.FutureTimeoutError as error:
            raise RelayError("the site's agent is not there") from error
        except grpc.RpcError as error:
            if error.code() is grpc.StatusCode.UNIMPLEMENTED:
                raise RelayError(f"the site's agent does not speak {PROTOCOL}") from error
            raise RelayError(f"the site's agent broke off: {error.code().name}") from error


def _order(manifest: str, adapter: bytes, spec: str) -> Iterator[Chunk]:
    digest = f"sha256:{hashlib.sha256(adapter).hexdigest()}"
    header = RoundHeader(manifest_json=manifest, adapter_bytes=len(adapter), adapter_digest=digest, spec_json=spec)
    yield Chunk(header=header)
    view = memoryview(adapter)
    for start in range(0, len(view), CHUNK_BYTES):
        yield Chunk(data=bytes(view[start : start + CHUNK_BYTES]))


def _answer(chunks: Iterable[Chunk]) -> tuple[str, str, bytes]:
    first = next(iter(chunks), None)
    if first is None or first.WhichOneof("part") != "reply":
        raise RelayError("the agent's answer has no header")
    reply = first.reply
    if reply.adapter_bytes > MAX_UPDATE_BYTES:
        raise RelayError(f"the agent announced {reply.adapter_bytes} bytes")
    update = bytearray()
    for chunk in chunks:
        if chunk.WhichOneof("part") != "data" or len(update) + len(chunk.data) > reply.adapter_bytes:
            raise RelayError("the agent's answer is not what its header announced")
        update += chunk.data
    if len(update) != reply.adapter_bytes:
        raise RelayError(f"{len(update)} of {reply.adapter_bytes} announced bytes arrived from the agent")
    return reply.status, reply.document_json, bytes(update)
