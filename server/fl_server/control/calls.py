"""The gRPC side of the check before every action: which call is which action, and how an error travels.

The check lies around the whole service, not at each call: a call without an action of its own is closed to everybody.
Whether a call streams its answer is what `control.proto` says.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import grpc
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from fl_server.access.check import Access
from fl_server.identity.authority import Identity, identity
from fl_shared.errors import ConcordatError

MAX_MESSAGE_BYTES = 2000  # of message and fix each: gRPC takes 16 KiB of details, and JSON writes 4 bytes as 12
_NOT_ALLOWED = ("wrong-role", "not-authorised", "expired")

ACTION_OF_CALL = {
    "Status": "status",
    "InviteSite": "sites invite",
    "ListSites": "sites list",
    "ShowSite": "sites show",
    "RevokeSite": "sites revoke",
    "PlanRun": "runs plan",
    "LaunchRun": "runs launch",
    "ListRuns": "runs list",
    "ShowRun": "runs show",
    "WatchRun": "runs watch",
    "StopRun": "runs stop",
    "PauseRun": "runs pause",
    "ResumeRun": "runs resume",
    "ListReceipts": "receipts list",
    "ListAdapters": "adapters list",
    "GetAdapter": "adapters export",
    "PromoteAdapter": "adapters promote",
    "ListReleases": "promotions list",
    "ListAdminLog": "audit list",
}
"""Each call of `control.proto` and its action in `fl_server.access.check.ACTIONS`."""


def caller(context: grpc.ServicerContext) -> Identity:
    """Whose certificate the caller has shown; TLS has verified it."""
    pem = bytes(next(iter(context.auth_context().get("x509_pem_cert", [])), b""))
    der = x509.load_pem_x509_certificate(pem).public_bytes(serialization.Encoding.DER)
    return identity(der)


def _abort(context: grpc.ServicerContext, error: ConcordatError) -> NoReturn:
    """End the call with the error as JSON in the details; `fl_server.cli.connection` reads it back."""
    detail = error.to_dict() | {"message": _cut(error.message), "fix": _cut(error.fix)}
    del detail["error"]  # this API calls it `message`, and both would be more than gRPC takes
    code = grpc.StatusCode.PERMISSION_DENIED if error.code in _NOT_ALLOWED else grpc.StatusCode.FAILED_PRECONDITION
    context.abort(code, json.dumps(detail))
    raise error  # abort raises; this line is for the type checker


def _cut(text: str) -> str:
    data = text.encode("utf-8", "replace")
    return text if len(data) <= MAX_MESSAGE_BYTES else data[:MAX_MESSAGE_BYTES].decode("utf-8", "ignore") + "…"


class CheckedCalls(grpc.ServerInterceptor):  # type: ignore[type-arg]  # generic in the stubs alone
    """Lets every call of the service act through `Access.acting`, and turns our errors into typed answers."""

    def __init__(self, access: Access) -> None:
        self._access = access

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler[Any, Any] | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler[Any, Any] | None:
        """The call's handler behind the check; None for a call that does not exist."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        if handler.request_streaming:
            raise TypeError("a call of the control API takes one request")
        action = ACTION_OF_CALL.get(str(handler_call_details.method).rpartition("/")[2], "")
        answers: Any = handler.unary_stream if handler.response_streaming else handler.unary_unary

        def one(request: Message, context: grpc.ServicerContext) -> Any:
            try:
                with self._access.acting(caller(context), action, _arguments(request)):
                    return answers(request, context)
            except ConcordatError as error:
                _abort(context, error)

        def many(request: Message, context: grpc.ServicerContext) -> Iterator[Any]:
            try:
                with self._access.acting(caller(context), action, _arguments(request)):
                    yield from answers(request, context)
            except ConcordatError as error:
                _abort(context, error)

        codecs = {
            "request_deserializer": handler.request_deserializer,
            "response_serializer": handler.response_serializer,
        }
        if handler.response_streaming:
            return grpc.unary_stream_rpc_method_handler(many, **codecs)
        return grpc.unary_unary_rpc_method_handler(one, **codecs)


def _arguments(request: Message) -> dict[str, Any]:
    """The fields of a request that were set, by the names that `control.proto` gives them."""
    table: dict[str, Any] = MessageToDict(request, preserving_proto_field_name=True)
    return table
