"""The untrusted half of a site: carries one round from Flower to the agent's Unix socket and back.

It sees the signed manifest and the global adapter, which are the coordinator's, and the reply, which the
agent has already decided to release. It has no key, no data path and no ledger, and needs none.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import grpc
import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Array

from fl_shared.adapter import MAX_BYTES, digest
from fl_shared.errors import TransportError
from fl_shared.wire.agent_pb2 import Chunk, RoundHeader
from fl_shared.wire.agent_pb2_grpc import AgentStub
from fl_shared.wire.chunks import join, split

CHANNEL_OPTIONS = [("grpc.max_receive_message_length", 4 << 20), ("grpc.max_send_message_length", 4 << 20)]
CONNECT_TIMEOUT_S = 20.0

app = ClientApp()


def _order(manifest: str, adapter: bytes) -> Iterator[Chunk]:
    yield Chunk(header=RoundHeader(manifest_json=manifest, adapter_bytes=len(adapter), adapter_digest=digest(adapter)))
    for piece in split(adapter):
        yield Chunk(data=piece)


def _pieces(chunks: Iterator[Chunk]) -> Iterator[bytes]:
    for chunk in chunks:
        if chunk.WhichOneof("part") != "data":
            raise TransportError("the agent sent a second header", fix="update the site's agent")
        yield chunk.data


def ask_agent(socket: str, manifest: str, adapter: bytes, timeout_s: float) -> tuple[str, str, bytes]:
    """Send one round to the agent; (status, signed document, update bytes).

    Raises:
        TransportError: the agent is not there, or its answer is cut off or damaged.
    """
    with grpc.insecure_channel(f"unix:{socket}", options=CHANNEL_OPTIONS) as channel:
        try:
            grpc.channel_ready_future(channel).result(CONNECT_TIMEOUT_S)
            answer = AgentStub(channel).Round(_order(manifest, adapter), timeout=timeout_s)
            first = next(answer)
            if first.WhichOneof("part") != "reply":
                raise TransportError("the agent's answer has no header", fix="update the site's agent")
            reply = first.reply
            update = join(
                _pieces(answer),
                expected_bytes=reply.adapter_bytes,
                expected_digest=reply.adapter_digest,
                limit=MAX_BYTES,
            )
        except (grpc.FutureTimeoutError, StopIteration) as error:
            raise TransportError("the site's agent is not there", fix="the site's operator starts it") from error
        except grpc.RpcError as error:
            raise TransportError(
                f"the site's agent broke off: {error.code().name}", fix="see the site's own log"
            ) from error
    return reply.status, reply.document_json, update


@app.train()
def train(message: Message, context: Context) -> Message:
    """Forward the round and return what the agent answers."""
    manifest = str(message.content.config_records["config"]["manifest"])
    adapter = message.content.array_records["arrays"]["adapter"].numpy().tobytes()
    timeout_s = float(str(message.content.config_records["config"].get("timeout-s", 3600.0)))
    socket = str(context.node_config["agent-socket"])
    try:
        status, document, update = ask_agent(socket, manifest, adapter, timeout_s)
    except TransportError as error:
        status, update = "failed", b""
        document = json.dumps({"code": "unreachable", "message": error.message})
    content = RecordDict({"config": ConfigRecord({"status": status, "document": document})})
    if status == "ok":
        content["arrays"] = ArrayRecord({"adapter": Array(np.frombuffer(update, dtype=np.uint8))})
    return Message(content, reply_to=message)
