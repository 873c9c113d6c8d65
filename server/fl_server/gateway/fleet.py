"""Flower's Fleet calls, bound to the site whose certificate carries them.

Flower 1.41 signs a call with the node's key and checks that the key belongs to the node id in the call. Two things
it does not check, so the gateway does, before a byte reaches the SuperLink:

* that the key is the one of the site that speaks: a site with another site's node key would be that site;
* who a pushed message says it is from: any registered node could answer in another's name, or (with no
  `reply_to_message_id` and the SuperLink's own id as the sender) send orders to other sites' SuperNodes.
"""

from __future__ import annotations

import functools
from base64 import b64encode
from collections.abc import Mapping

from cryptography.hazmat.primitives import serialization
from flwr.proto.fleet_pb2 import PushMessagesRequest
from google.protobuf.message import DecodeError

from fl_server.db.models import SiteRow
from fl_shared.errors import EnrolmentError, TransportError

PATH = "/v1/fleet"
CALLS = frozenset(
    {
        "activate-node", "deactivate-node", "send-node-heartbeat", "pull-messages", "push-messages",
        "pull-object", "push-object", "confirm-message-received", "get-run", "get-fab",
    }
)  # fmt: skip
PUSH_MESSAGES = "push-messages"
DEACTIVATE = "deactivate-node"
SIGNS_OF_LIFE = frozenset({"activate-node", "send-node-heartbeat", "pull-messages"})
MAX_PUSH_MESSAGES_BYTES = 16 << 20  # headers of messages alone: their content follows as objects
_NODE_KEY_HEADER = "flwr-public-key"
_PASSED_HEADERS = frozenset({"content-type", "content-length", "accept", "accept-encoding", "user-agent"})


@functools.lru_cache(maxsize=4096)
def _node_key_as_flower_sends_it(openssh: str) -> str:
    key = serialization.load_ssh_public_key(openssh.encode("ascii"))
    pem = key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return b64encode(pem).decode("ascii")


def require_own_node(headers: Mapping[str, str], site: SiteRow) -> None:
    """EnrolmentError unless the call is signed by the node key that the site proved at its enrolment.

    The signature itself, and that the node id in the call belongs to this key, is checked by Flower.
    """
    if headers.get(_NODE_KEY_HEADER) != _node_key_as_flower_sends_it(site.node_public_key):
        raise EnrolmentError(
            f"the Flower node key is not the one of {site.site}",
            fix="use the node key that enrolment made",
            code="wrong-node",
        )


def require_own_messages(body: bytes, site: SiteRow) -> None:
    """EnrolmentError unless every pushed message is an answer, and from this site's node.

    Raises:
        TransportError: the body is no such call.
    """
    try:
        request = PushMessagesRequest.FromString(body)
    except DecodeError as error:
        raise TransportError("the call cannot be read", fix="use Flower's SuperNode", code="bad-call") from error
    for message in request.messages_list:
        sender = str(message.metadata.src_node_id)
        if sender != site.node_id or not message.metadata.reply_to_message_id:
            raise EnrolmentError(
                f"a message of {site.site} is not an answer of its own node",
                fix="use Flower's SuperNode",
                code="wrong-node",
            )


def passed_headers(headers: Mapping[str, str]) -> dict[str, str]:
    """The headers that Flower needs, and no others."""
    return {k: v for k, v in headers.items() if k.lower() in _PASSED_HEADERS or k.lower().startswith("flwr-")}
