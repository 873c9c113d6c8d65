"""A reply's bytes: read where they lie, refused in any other form, and let go at once."""

from __future__ import annotations

import gc
import io
import weakref
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from fl_server.rounds.replies import BadReply, octets, parts


def _content(**changes: Any) -> RecordDict:
    records = {
        "config": ConfigRecord({"status": "ok", "document": "{}"}),
        "arrays": ArrayRecord({"adapter": Array(np.arange(200, dtype=np.uint8))}),
    } | changes
    return RecordDict({name: record for name, record in records.items() if record is not None})


def test_the_bytes_are_not_copied() -> None:
    """What comes out is a view of what Flower delivered."""
    array = Array(np.arange(200, dtype=np.uint8))
    row = octets(array)
    assert bytes(row) == bytes(range(200))
    assert row.obj is array.data
    status, document, update = parts(_content())
    assert (status, document, bytes(update)) == ("ok", "{}", bytes(range(200)))


def test_no_array_is_read_for_a_refusal() -> None:
    """A reply that is not `ok` has no update, whatever it carries."""
    refused = ConfigRecord({"status": "refused", "document": "{}"})
    assert parts(_content(config=refused)) == ("refused", "{}", b"")
    assert parts(_content(config=refused, arrays=None)) == ("refused", "{}", b"")


def test_a_reply_is_free_as_soon_as_it_is_dropped() -> None:
    """Nothing ties the content into a cycle: 50 MB do not wait for the garbage collector."""
    gc.disable()
    try:
        content = _content()
        parts(content)
        gone = weakref.ref(content)
        del content
        assert gone() is None
    finally:
        gc.enable()


def _npy(value: Any, version: tuple[int, int] | None = None) -> bytes:
    sink = io.BytesIO()
    np.lib.format.write_array(sink, np.asarray(value), version=version)
    return sink.getvalue()


GOOD = _npy(np.zeros(4, np.uint8))
ODD = {
    "two axes": _npy(np.zeros((2, 2), np.uint8)),
    "no axis": _npy(np.uint8(1)),
    "floats": _npy(np.zeros(4, np.float32)),
    "signed bytes": _npy(np.zeros(4, np.int8)),
    "cut short": GOOD[:-1],
    "too long": GOOD + b"\0",
    "only the magic": GOOD[:8],
    "nothing": b"",
    "no npy": b"PK\3\4" + b"\0" * 100,
    "a pickle": b"\x80\x04N.",
    "an open bracket": GOOD[:10] + b"(" * 118,
    "an open string": GOOD[:10] + b"{'''" + b" " * 114,
    "a name": GOOD[:10] + b"x" * 118,
}


@pytest.mark.parametrize("name", sorted(ODD))
def test_another_array_is_refused(name: str) -> None:
    """Anything but one row of unsigned bytes, of exactly the length that its header says, is a bad update."""
    with pytest.raises(BadReply) as caught:
        octets(Array("uint8", (4,), "numpy.ndarray", ODD[name]))
    assert caught.value.code == "bad-update"


def test_a_second_version_header_is_read() -> None:
    """numpy's longer header is read, too."""
    array = Array("uint8", (4,), "numpy.ndarray", _npy(np.arange(4, dtype=np.uint8), version=(2, 0)))
    assert bytes(octets(array)) == bytes(range(4))


@pytest.mark.parametrize(
    "content",
    [
        None,
        "text",
        RecordDict(),
        _content(arrays=None),
        _content(arrays=ArrayRecord()),
        _content(arrays=MetricRecord({"adapter": 1})),
        _content(config=None),
        _content(config=MetricRecord({"status": 1})),
        _content(config=ConfigRecord({"status": "ok"})),
    ],
    ids=["nothing", "text", "empty", "no arrays", "no adapter", "metrics", "no config", "config as metrics", "half"],
)
def test_another_form_is_refused(content: Any) -> None:
    """A reply without the agreed records is a bad reply, never an error of ours."""
    with pytest.raises(BadReply) as caught:
        parts(content)
    assert caught.value.code == "bad-form"
