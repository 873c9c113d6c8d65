"""`fl_shared.adapters.safetensors`: safetensors bytes, the same everywhere, and nothing else gets in."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.numpy import load, save

from fl_shared.adapters import safetensors as adapter
from fl_shared.adapters.safetensors import MAX_NAME, digest, pack, require_finite, require_same_shapes, shapes, unpack
from fl_shared.errors import DataError

NAMES = st.text(st.characters(exclude_categories=["C", "Z"]), min_size=1, max_size=30).filter("__metadata__".__ne__)
ARRAYS = hnp.arrays(np.float32, hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=4))
ADAPTERS = st.dictionaries(NAMES, ARRAYS, max_size=5)
METADATA = st.dictionaries(NAMES, NAMES, max_size=5)


def same(left: dict[str, Any], right: dict[str, Any]) -> bool:
    """Equal to the bit, NaN included."""
    return shapes(left) == shapes(right) and all(left[name].tobytes() == right[name].tobytes() for name in left)


@given(ADAPTERS, METADATA)
def test_an_adapter_survives_the_wire(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """Packing and unpacking gives the same names, shapes (scalars and empty ones too) and bits."""
    data = pack(tensors, metadata)
    assert same(unpack(data), tensors)
    assert pack(unpack(data), metadata) == data


@given(ADAPTERS, METADATA)
def test_the_bytes_are_safetensors(tensors: dict[str, Any], metadata: dict[str, str]) -> None:
    """The safetensors library reads what we write, and writes what we read; without metadata byte for byte."""
    if tensors or metadata:
        assert same(load(pack(tensors, metadata)), tensors)
    if tensors:
        theirs = save(tensors)
        assert same(unpack(theirs), tensors)
        assert theirs == pack(tensors)


@given(ADAPTERS)
def test_the_order_of_tensors_does_not_matter(tensors: dict[str, Any]) -> None:
    """The digest belongs to the tensors, not to the order or memory layout in which they came."""
    turned = {name: np.array(value, order="F") for name, value in reversed(tensors.items())}
    assert digest(pack(turned)) == digest(pack(tensors))


def test_the_bytes_are_the_same_in_every_process() -> None:
    """Metadata of several fields has one order, whatever the process's hash seed."""
    source = (
        "import numpy as np; from fl_shared.adapters.safetensors import digest, pack; "
        "print(digest(pack({n: np.ones((2, 3), np.float32) for n in 'ba'}, {c: c for c in 'hgfedcba'})))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", source],
            env=os.environ | {"PYTHONHASHSEED": str(seed)},
            capture_output=True,
            check=True,
            timeout=60,
        ).stdout
        for seed in range(4)
    }
    assert len(found) == 1


def test_no_tensors_are_no_bytes() -> None:
    """The empty adapter, which opens a run, is the empty byte string both ways."""
    assert pack({}) == b""
    assert unpack(b"") == {}
    assert digest(b"") == "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": np.ones(2, np.float64)},
        {"a": np.ones(2, np.float16)},
        {"a": np.ones(2, ">f4")},
        {"a": np.ones(2, np.int32)},
        {"a": np.ones((1, 1, 1, 1), np.float32)},
        {"": np.ones(1, np.float32)},
        {"__metadata__": np.ones(1, np.float32)},
        {"a\n": np.ones(1, np.float32)},
        {"a" * (MAX_NAME + 1): np.ones(1, np.float32)},
    ],
    ids=["float64", "float16", "big-endian", "int32", "4 axes", "no name", "reserved", "control", "long name"],
)
def test_what_is_no_adapter_is_not_packed(tensors: dict[str, Any]) -> None:
    """Another dtype, a fourth axis or an unusable name is refused with a fix."""
    with pytest.raises(DataError) as caught:
        pack(tensors)
    assert caught.value.fix


def raw(header: Any, body: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def entry(**changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} | changes


FOUR = b"\0" * 4
HOSTILE = {
    "short": b"1234567",
    "header beyond the end": struct.pack("<Q", 1 << 62) + b"{}",
    "header of 17 MiB": struct.pack("<Q", 17 << 20) + b" " * (17 << 20),
    "no JSON": raw(b"nonsense"),
    "no UTF-8": raw(b'{"\xff":1}'),
    "a list": raw([entry()], FOUR),
    "bottomless": raw(b'{"a":' + b"[" * 100_000),
    "a tensor twice": raw(
        b'{"a":' + json.dumps(entry()).encode() + b',"a":' + json.dumps(entry()).encode() + b"}", FOUR
    ),
    "half precision": raw({"a": entry(dtype="F16", data_offsets=[0, 2])}, b"\0\0"),
    "64 bits": raw({"a": entry(dtype="F64", data_offsets=[0, 8])}, FOUR * 2),
    "no dtype": raw({"a": {"shape": [1], "data_offsets": [0, 4]}}, FOUR),
    "an unknown dtype": raw({"a": entry(dtype="X")}, FOUR),
    "four axes": raw({"a": entry(shape=[1, 1, 1, 1])}, FOUR),
    "a negative shape": raw({"a": entry(shape=[-1])}, FOUR),
    "a huge shape": raw({"a": entry(shape=[1 << 62, 4])}, FOUR),
    "an endless shape": raw({"a": entry(shape=[10**30])}, FOUR),
    "no shape": raw({"a": entry(shape=None)}, FOUR),
    "a shape of texts": raw({"a": entry(shape=["1"])}, FOUR),
    "offsets beyond the end": raw({"a": entry(data_offsets=[0, 1 << 40])}, FOUR),
    "offsets reversed": raw({"a": entry(data_offsets=[4, 0])}, FOUR),
    "overlapping tensors": raw({"a": entry(), "b": entry()}, FOUR),
    "a hole": raw({"a": entry(data_offsets=[4, 8])}, FOUR * 2),
    "bytes left over": raw({"a": entry()}, FOUR * 2),
    "bytes missing": raw({"a": entry()}, b"\0\0"),
    "an entry that is no object": raw({"a": 5}, FOUR),
    "a control character": raw({"a\x1b[2J": entry()}, FOUR),
    "a surrogate name": raw(b'{"\\ud800":' + json.dumps(entry()).encode() + b"}", FOUR),
    "metadata that is no text": raw({"__metadata__": {"a": 5}, "a": entry()}, FOUR),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_bytes_are_refused(name: str) -> None:
    """Bytes that are not exactly an adapter give DataError, with a short message and a fix."""
    with pytest.raises(DataError) as caught:
        unpack(HOSTILE[name])
    assert caught.value.fix
    assert len(caught.value.message) < 1000
    assert "\x1b" not in caught.value.message


GOOD = pack({"a": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones((), np.float32)}, {"k": "v"})


@given(st.data())
def test_a_damaged_adapter_is_read_or_refused(data: st.DataObject) -> None:
    """Whatever happens to the bytes of an adapter, unpack gives float32 tensors or DataError."""
    damaged = bytearray(GOOD)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(damaged) - 1))
        damaged[at] = data.draw(st.integers(0, 255))
    cut = bytes(damaged[: data.draw(st.integers(0, len(damaged)))])
    try:
        tensors = unpack(cut)
    except DataError:
        return
    assert all(value.dtype == np.float32 and value.ndim <= 3 for value in tensors.values())


@given(st.binary(max_size=200))
def test_random_bytes_are_refused(data: bytes) -> None:
    """Random bytes are no adapter, except the empty string."""
    if data:
        with pytest.raises(DataError):
            unpack(data)


def test_limits_hold_both_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Too many tensors or bytes are refused by the sender and by the receiver."""
    two = {"a": np.ones(4, np.float32), "b": np.ones(4, np.float32)}
    data = pack(two)
    for name, value in (("MAX_TENSORS", 1), ("MAX_BYTES", len(data) - 1)):
        with monkeypatch.context() as patch:
            patch.setattr(adapter, name, value)
            with pytest.raises(DataError, match="the adapter has"):
                pack(two)
            with pytest.raises(DataError, match="the adapter has"):
                unpack(data)
    assert same(unpack(data), two)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_infinity_and_nan_are_named(bad: float) -> None:
    """The finite check names the tensor that holds the bad number, and passes without one."""
    tensors = {"good": np.zeros((2, 2), np.float32), "bad": np.zeros((2, 2), np.float32)}
    require_finite(tensors)
    tensors["bad"][1, 1] = bad
    with pytest.raises(DataError, match="tensor bad holds"):
        require_finite(tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": None}, "tensor a is missing"),
        ({"c": (1,)}, "tensor c is not expected"),
        ({"b": (3, 2)}, r"tensor b has shape \(3, 2\), expected \(2, 3\)"),
        ({"b": (6,)}, "tensor b has shape"),
    ],
)
def test_other_tensors_than_expected_are_named(change: dict[str, Any], message: str) -> None:
    """A missing, extra or differently shaped tensor is named; the same set passes."""
    expected: dict[str, tuple[int, ...]] = {"a": (1,), "b": (2, 3)}
    sent = {name: shape for name, shape in (expected | change).items() if shape is not None}
    require_same_shapes({name: np.zeros(shape, np.float32) for name, shape in expected.items()}, expected)
    with pytest.raises(DataError, match=message):
        require_same_shapes({name: np.zeros(shape, np.float32) for name, shape in sent.items()}, expected)
