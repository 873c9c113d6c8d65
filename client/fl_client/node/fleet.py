"""What the tunnel reads of Flower's Fleet messages as they pass."""

from __future__ import annotations

import contextlib
import hashlib

FLEET_CALLS = frozenset(
    {
        "activate-node",
        "deactivate-node",
        "send-node-heartbeat",
        "pull-messages",
        "push-messages",
        "pull-object",
        "push-object",
        "confirm-message-received",
        "get-run",
        "get-fab",
    }
)


def sole_app(answer: bytes) -> tuple[str, bytes]:
    """Return `sha256:<hex>` of the app inside a serialised `GetFabResponse`, and a new message around that app.

    The digest is computed here; the hash that the coordinator states in the message is not believed. The new
    message holds the hashed bytes and nothing that its reader could take for another app: no second `fab`, no
    unknown field. Raises ValueError when the bytes are no such message or hold no app.
    """
    from flwr.proto.fab_pb2 import Fab, GetFabResponse
    from google.protobuf.message import DecodeError

    try:
        app = GetFabResponse.FromString(answer).fab
    except DecodeError as error:
        raise ValueError("the app that the coordinator sent cannot be read") from error
    if not app.content:
        raise ValueError("the coordinator sent no app")
    digest = hashlib.sha256(app.content).hexdigest()
    hashed = Fab(hash_str=digest, content=app.content, verifications=dict(app.verifications))
    return f"sha256:{digest}", GetFabResponse(fab=hashed).SerializeToString(deterministic=True)


def activated_node(answer: bytes) -> int:
    """Return the node id in a serialised `ActivateNodeResponse`; ValueError when it is none."""
    from flwr.proto.fleet_pb2 import ActivateNodeResponse
    from google.protobuf.message import DecodeError

    try:
        return ActivateNodeResponse.FromString(answer).node_id
    except DecodeError as error:
        raise ValueError("the coordinator's answer cannot be read") from error


def deactivation(node: int) -> bytes:
    """Return the serialised request that takes node `node` off line."""
    from flwr.proto.fleet_pb2 import DeactivateNodeRequest

    return DeactivateNodeRequest(node_id=node).SerializeToString()


class PendingReplies:
    """The replies that the SuperNode owes: it asks for work again only after it has answered.

    After an order that broke off while it was received (its run had ended) Flower's SuperNode gets out of step: it
    asks for the next order while a reply is still being made, and that reply stays until yet another order comes.
    """

    def __init__(self) -> None:
        """Nothing is owed yet."""
        self._owed: set[str] = set()

    def note(self, call: str, body: bytes, status: int) -> None:
        """Follow a call and the status of its answer. What cannot be read is the SuperLink's business."""
        from flwr.proto.fleet_pb2 import PushMessagesRequest
        from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest
        from google.protobuf.message import DecodeError

        with contextlib.suppress(DecodeError):
            if call == "push-messages":
                replies = PushMessagesRequest.FromString(body).messages_list
                self._owed -= {reply.metadata.reply_to_message_id for reply in replies}
            elif call == "confirm-message-received" and status == 200:
                self._owed.add(ConfirmMessageReceivedRequest.FromString(body).message_object_id)

    def called_in(self) -> bool:
        """Whether something was owed; from now on nothing is."""
        owed = bool(self._owed)
        self._owed.clear()
        return owed
