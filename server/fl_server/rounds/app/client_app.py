"""The untrusted half of a site: carries one round from Flower to the agent's Unix socket and back.

It sees the signed manifest and the global adapter, which are the coordinator's, and the reply, which the
agent has already decided to release. It has no key, no data path and no ledger, and needs none.
"""

from __future__ import annotations

import json

import numpy as np
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.common import Array

from .relay import RelayError, relay

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Forward the round and return what the agent answers."""
    manifest = str(message.content.config_records["config"]["manifest"])
    adapter = message.content.array_records["arrays"]["adapter"].numpy().tobytes()
    spec = str(message.content.config_records["config"].get("spec", ""))
    timeout_s = float(str(message.content.config_records["config"].get("timeout-s", 3600.0)))
    socket = str(context.node_config["agent-socket"])
    try:
        status, document, update = relay(socket, manifest, adapter, timeout_s, spec)
    except RelayError as error:
        status, update = "failed", b""
        document = json.dumps({"code": "unreachable", "message": str(error)})
    content = RecordDict({"config": ConfigRecord({"status": status, "document": document})})
    if status == "ok":
        content["arrays"] = ArrayRecord({"adapter": Array(np.frombuffer(update, dtype=np.uint8))})
    return Message(content, reply_to=message)
