"""Updates as bfloat16 and int8: what is lost is bounded, and nothing but the spec's form gets in."""

from __future__ import annotations

import json
import struct
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray
from safetensors.numpy import load as load_numpy
from safetensors.torch import load as load_torch
from safetensors.torch import save as save_torch

from fl_shared.adapters.encoding import BLOCK, blocks
from fl_shared.adapters.safetensors import MAX_NAME, SCALE, WIRES, digest, metadata, pack, unpack
from fl_shared.errors import DataError

LOSSY = ("bfloat16", "int8")
SHAPES = hnp.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=12)
SIZES = st.floats(-float(np.float32(1e37)), float(np.float32(1e37)), width=32)
ARRAYS = hnp.arrays(np.float32, SHAPES, elements=SIZES)
ADAPTERS = st.dictionaries(st.sampled_from("abcdef"), ARRAYS, min_size=1, max_size=4)


def bound(values: NDArray[np.float32], wire: str) -> NDArray[np.float64]:
    """The documented bound on each value's error."""
    exact = values.astype(np.float64)
    if wire == "bfloat16":
        return np.maximum(np.abs(exact) * 2.0**-8, 2.0**-134)
    flat = np.abs(exact).reshape(-1)
    largest = [flat[at : at + BLOCK].max() for at in range(0, flat.size, BLOCK)]
    limit = np.repeat(np.maximum(np.array(largest) / 254 * 1.0001, 127 * 2.0**-126), BLOCK)[: flat.size]
    return limit.reshape(values.shape)


@pytest.mark.parametrize("wire", LOSSY)
@given(tensors=ADAPTERS)
def test_the_error_is_bounded(wire: str, tensors: dict[str, NDArray[np.float32]]) -> None:
    """For any shape and any size of value, each decoded value is within the documented bound of what was sent."""
    decoded = unpack(pack(tensors, wire=wire), wire=wire)
    assert list(decoded) == sorted(tensors)
    for name, value in tensors.items():
        assert decoded[name].shape == value.shape
        assert decoded[name].dtype == np.float32
        assert (np.abs(decoded[name].astype(np.float64) - value) <= bound(value, wire)).all()


@pytest.mark.parametrize("wire", WIRES)
@given(tensors=ADAPTERS)
def test_what_was_decoded_is_sent_again_unchanged(wire: str, tensors: dict[str, NDArray[np.float32]]) -> None:
    """The same values give the same bytes; decoded float32 and bfloat16 values encode to the bytes they came from."""
    data = pack(tensors, {"k": "v"}, wire=wire)
    assert data == pack({name: value.copy() for name, value in tensors.items()}, {"k": "v"}, wire=wire)
    assert metadata(data) == {"k": "v"}
    if wire != "int8":
        assert digest(pack(unpack(data, wire=wire), {"k": "v"}, wire=wire)) == digest(data)


@given(
    values=hnp.arrays(
        np.float32, st.integers(1, 300), elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
    )
)
def test_bfloat16_is_what_torch_makes(values: NDArray[np.float32]) -> None:
    """Bit for bit torch's rounding to bfloat16, and a file that torch writes and reads in the same bytes."""
    theirs = torch.from_numpy(values).to(torch.bfloat16)
    if not bool(torch.isfinite(theirs).all()):
        with pytest.raises(DataError, match="too large for bfloat16"):
            pack({"w": values}, wire="bfloat16")
        return
    data = pack({"w": values}, wire="bfloat16")
    assert data == save_torch({"w": theirs})
    assert torch.equal(load_torch(data)["w"], theirs)
    assert np.array_equal(unpack(data, wire="bfloat16")["w"], theirs.float().numpy())


def test_int8_is_readable_without_us() -> None:
    """The safetensors library reads int8 values and scales; their product is what we decode."""
    value = np.random.default_rng(0).normal(0, 3, (7, 50)).astype(np.float32)
    data = pack({"w": value}, wire="int8")
    stock = load_numpy(data)
    assert stock["w"].dtype == np.int8
    assert stock["w" + SCALE].shape == (blocks(value.size),)
    plain = stock["w"].reshape(-1) * np.repeat(stock["w" + SCALE], BLOCK)[: value.size]
    assert np.array_equal(unpack(data, wire="int8")["w"].reshape(-1), plain)


def test_the_error_on_noise_is_small_against_the_noise() -> None:
    """On Gaussian values, as private updates are, root mean square: 0.2 % in bfloat16, 0.8 % in int8."""
    value = np.random.default_rng(1).normal(0, 1e-3, (400, 1000)).astype(np.float32)
    found = {}
    for wire in WIRES:
        data = pack({"w": value}, wire=wire)
        error = unpack(data, wire=wire)["w"] - value
        found[wire] = (float(np.sqrt(np.mean(error**2)) / value.std()), len(data) / (4 * value.size))
    assert found["float32"][0] == 0
    assert found["bfloat16"][0] < 0.002
    assert found["bfloat16"][1] < 0.501
    assert found["int8"][0] < 0.008
    assert found["int8"][1] < 0.259


@pytest.mark.parametrize("wire", LOSSY)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_not_encoded(wire: str, bad: float) -> None:
    """NaN and infinity have no place in a lossy form; the tensor is named."""
    with pytest.raises(DataError, match="tensor w holds"):
        pack({"w": np.array([1.0, bad], np.float32)}, wire=wire)


@pytest.mark.parametrize("sent", WIRES)
@pytest.mark.parametrize("expected", WIRES)
def test_another_form_than_the_specs_is_refused(sent: str, expected: str) -> None:
    """Bytes in one form are not read as another."""
    value = {"w": np.ones((3, 3), np.float32)}
    data = pack(value, wire=sent)
    if sent == expected:
        assert np.array_equal(unpack(data, wire=expected)["w"], value["w"])
        return
    with pytest.raises(DataError) as caught:
        unpack(data, wire=expected)
    assert caught.value.fix


def test_a_name_may_be_as_long_with_a_scale() -> None:
    """The suffix of the scale does not count; a tensor whose own name ends in it is refused."""
    name = "n" * MAX_NAME
    assert list(unpack(pack({name: np.ones(3, np.float32)}, wire="int8"), wire="int8")) == [name]
    with pytest.raises(DataError, match="name of a scale"):
        pack({"w" + SCALE: np.ones(3, np.float32)}, wire="int8")


def raw(entries: dict[str, tuple[str, list[int], bytes]]) -> bytes:
    header: dict[str, Any] = {}
    body = b""
    for name, (dtype, shape, data) in entries.items():
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [len(body), len(body) + len(data)]}
        body += data
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def scale(*values: float) -> bytes:
    return np.array(values, "<f4").tobytes()


HOSTILE = {
    "no scale": raw({"w": ("I8", [2], b"\1\2")}),
    "a scale of nothing": raw({"w#scale": ("F32", [1], scale(1))}),
    "a scale of a scale": raw({"w#scale": ("F32", [1], scale(1)), "w#scale#scale": ("F32", [1], scale(1))}),
    "two scales for one block": raw({"w#scale": ("F32", [2], scale(1, 1)), "w": ("I8", [2], b"\1\2")}),
    "no scale for the second block": raw({"w#scale": ("F32", [1], scale(1)), "w": ("I8", [129], b"\1" * 129)}),
    "a scale that is int8": raw(
        {"w": ("I8", [1], b"\1"), "w#scale": ("I8", [1], b"\1"), "w#scale#scale": ("F32", [1], scale(1))}
    ),
    "a negative scale": raw({"w#scale": ("F32", [1], scale(-1)), "w": ("I8", [1], b"\1")}),
    "a scale that is no number": raw({"w#scale": ("F32", [1], scale(np.nan)), "w": ("I8", [1], b"\1")}),
    "an infinite scale": raw({"w#scale": ("F32", [1], scale(np.inf)), "w": ("I8", [1], b"\1")}),
    "plain float32": pack({"w": np.ones(2, np.float32)}),
    "half of the tensor": raw({"w#scale": ("F32", [1], scale(1)), "w": ("I8", [3], b"\1\2")}),
}


@pytest.mark.parametrize("name", sorted(HOSTILE))
def test_hostile_scales_are_refused(name: str) -> None:
    """Scales that do not fit their tensor, or are no sizes, give DataError."""
    with pytest.raises(DataError) as caught:
        unpack(HOSTILE[name], wire="int8")
    assert caught.value.fix


def test_unaligned_tensors_are_read() -> None:
    """A file of another writer, whose float32 scale begins at an odd byte, decodes the same."""
    odd = raw({"w": ("I8", [1], b"\2"), "w#scale": ("F32", [1], scale(1.5))})
    found = unpack(memoryview(odd), wire="int8")["w"]
    assert found.tolist() == [3.0]
    assert found.flags.aligned


def test_float32_is_not_copied() -> None:
    """A float32 adapter is read where it lies, and cannot be written to by accident."""
    data = pack({"w": np.ones(1000, np.float32)})
    found = unpack(data)["w"]
    assert np.shares_memory(found, np.frombuffer(data, np.uint8))
    assert not found.flags.writeable
