"""Replies as Flower's strategies take them, made without a Flower run."""

from __future__ import annotations

import time
from collections.abc import Mapping

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.app.message.message import make_message
from flwr.app.metadata import Metadata
from numpy.typing import NDArray


def reply(tensors: Mapping[str, NDArray[np.generic]], node: int = 1) -> Message:
    """A training reply of one site: its arrays, and the one example that makes every site weigh the same."""
    content = RecordDict(
        {
            "arrays": ArrayRecord({name: Array(value) for name, value in sorted(tensors.items())}),
            "metrics": MetricRecord({"num-examples": 1}),
        }
    )
    metadata = Metadata(
        run_id=1,
        message_id=f"reply-{node}",
        src_node_id=node,
        dst_node_id=1,
        reply_to_message_id=f"order-{node}",
        group_id="",
        created_at=time.time(),
        ttl=3600.0,
        message_type="train",
    )
    return make_message(metadata=metadata, content=content)
