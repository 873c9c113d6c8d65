"""Validation of a site's reply against its order: nothing in it is believed before its signature."""

from __future__ import annotations

import io
import json
import time
from collections.abc import Callable
from tokenize import TokenError
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict

from fl_server.runs.views import Reply
from fl_shared.adapters.safetensors import Buffer, Tensors, digest, unpack
from fl_shared.documents.round import Receipt, Refusal
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, SignatureError
from fl_shared.identity.signing import open_document

MAX_DOCUMENT_CHARACTERS = 1 << 20
CLOCK_SKEW_S = 600.0
UNREACHABLE = "unreachable"
_NO_ARRAY = (ValueError, TypeError, SyntaxError, TokenError, RecursionError, MemoryError)  # numpy lets all of them out


class BadReply(ConcordatError):
    """A reply that is not what it should be; only its sender is affected."""

    default_code = "bad-reply"


def parts(content: object) -> tuple[str, str, Buffer]:
    """Status, document and update bytes of a Flower reply; the update is empty unless the status is `ok`.

    Raises:
        BadReply: it has another form than agreed.
    """
    try:
        if not isinstance(content, RecordDict):
            raise TypeError("no records")
        # By the records' names: Flower's `content.config_records` ties the content into a cycle, and a reply of
        # 50 MB then stays until the garbage collector happens to run.
        config = content["config"]
        if not isinstance(config, ConfigRecord):
            raise TypeError("no configuration")
        status, document = str(config["status"]), str(config["document"])
        if status != "ok":
            return status, document, b""
        arrays = content["arrays"]
        if not isinstance(arrays, ArrayRecord):
            raise TypeError("no arrays")
        return status, document, octets(arrays["adapter"])
    except (KeyError, ValueError, TypeError) as error:
        raise BadReply("the reply has another form than agreed", code="bad-form") from error


def octets(array: Array) -> memoryview:
    """A row of bytes that travels as a Flower array, where it lies: Flower's own way out copies it.

    Raises:
        BadReply: it is no row of bytes.
    """
    source = io.BytesIO(array.data)
    try:
        version = np.lib.format.read_magic(source)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(source)
    except _NO_ARRAY as error:
        raise BadReply("the update is no array", code="bad-update") from error
    row = memoryview(array.data)[source.tell() :]
    if dtype != np.uint8 or shape != (len(row),):
        raise BadReply("the update is not a row of bytes", code="bad-update")
    return row


class Expected:
    """What every reply of one site in one round must fit.

    Args:
        issued: whether a manifest digest was signed for this run, round, site and adapter.
    """

    def __init__(self, spec: RunSpec, round: int, site: str, signing_key: str, issued: Callable[[str], bool]) -> None:
        self._spec = spec
        self._round = round
        self._site = site
        self._key = signing_key
        self._issued = issued

    def _open(self, text: str) -> dict[str, Any]:
        if len(text) > MAX_DOCUMENT_CHARACTERS:
            raise BadReply(f"the document has {len(text)} characters", code="bad-document")
        try:
            return open_document(json.loads(text), self._key)
        except SignatureError as error:
            raise BadReply(error.message, code="bad-signature") from error
        except (ValueError, RecursionError) as error:
            raise BadReply("the document is not JSON", code="bad-document") from error

    def _require(self, document: Receipt | Refusal) -> None:
        for name, value, expected in (
            ("run", document.run, self._spec.run.name),
            ("round", document.round, self._round),
            ("site", document.site, self._site),
        ):
            if value != expected:
                raise BadReply(f"the document is for {name} {value}, not {expected}", code="wrong-round")
        if not self._issued(document.manifest_digest):
            raise BadReply("the document answers a manifest that was not sent", code="wrong-manifest")
        if document.created_at > time.time() + CLOCK_SKEW_S:
            raise BadReply("the document is from the future; check the clocks", code="wrong-time")

    def receipt(self, text: str, update: Buffer) -> tuple[Reply, Tensors]:
        """The reply to store and the update's tensors, after every check but shapes and finiteness.

        Raises:
            BadReply: with a code that says which check failed.
        """
        try:
            receipt = Receipt.from_dict(self._open(text))
            self._require(receipt)
            for name, value, expected in (
                ("spec_digest", receipt.spec_digest, self._spec.digest),
                ("model_digest", receipt.model_digest, self._spec.run.base_model),
            ):
                if value != expected:
                    raise BadReply(f"the receipt's {name} is {value}, not {expected}", code="wrong-spec")
            if receipt.update_digest != digest(update):
                raise BadReply("the update is not the one that the receipt names", code="wrong-digest")
            tensors = unpack(update, wire=self._spec.run.wire)
        except BadReply:
            raise
        except ConcordatError as error:
            raise BadReply(error.message, code="bad-document") from error
        reply = Reply(
            site=self._site,
            status="ok",
            epsilon_spent_total=receipt.epsilon_spent_total,
            delta=receipt.delta,
            document_json=text,
        )
        return reply, tensors

    def refusal(self, status: str, text: str) -> Reply | None:
        """The signed refusal to store; None when the agent was not there to answer.

        Raises:
            BadReply: a document that is neither.
        """
        try:
            plain = json.loads(text) if len(text) <= MAX_DOCUMENT_CHARACTERS else None
        except (ValueError, RecursionError) as error:
            raise BadReply("the document is not JSON", code="bad-document") from error
        if status == "failed" and isinstance(plain, dict) and plain.get("code") == UNREACHABLE:
            return None
        try:
            refusal = Refusal.from_dict(self._open(text))
            self._require(refusal)
        except BadReply:
            raise
        except ConcordatError as error:
            raise BadReply(error.message, code="bad-document") from error
        kind = "failed" if refusal.code == "failed" else "refused"
        return Reply(self._site, kind, refusal.code, refusal.message, document_json=text)
