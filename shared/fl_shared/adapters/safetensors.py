"""LoRA adapters as bytes: safetensors, with hard limits, never pickle.

In memory an adapter is float32. Its bytes are float32 too, or, for an update whose run spec says so, bfloat16 or int8
(`fl_shared.adapters.encoding`). An int8 tensor `NAME` has its scales beside it as `NAME#scale`.
"""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from numpy.typing import NDArray

from fl_shared.adapters.encoding import blocks, from_bfloat16, from_int8, to_bfloat16, to_int8
from fl_shared.canonical import parse_json, sha256_hex
from fl_shared.errors import ConfigError, DataError, shown

Tensors = dict[str, NDArray[np.float32]]
Buffer = bytes | memoryview

WIRES = ("float32", "bfloat16", "int8")
SCALE = "#scale"
SERVER_STATE = "server-state"  # metadata of a global adapter: digest of the optimizer state committed with it
MAX_BYTES = 4 << 30
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_NDIM = 3
MAX_NAME = 512

_STORED: dict[str, np.dtype[Any]] = {"F32": np.dtype("<f4"), "BF16": np.dtype("<u2"), "I8": np.dtype("i1")}
_ALLOWED = {"float32": ("F32",), "bfloat16": ("BF16",), "int8": ("I8", "F32")}


@dataclass(frozen=True, slots=True)
class _Entry:
    """One tensor as the header describes it. `start` and `end` in bytes from the end of the header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    start: int
    end: int


def pack(
    tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str] | None = None, *, wire: str = "float32"
) -> bytes:
    """Safetensors bytes of float32 tensors: equal tensors and metadata give equal bytes, on every machine.

    An empty adapter without metadata packs to no bytes at all. The header is written here, because the
    safetensors library puts metadata in an order that differs from process to process.

    Raises:
        DataError: another dtype, more than 3 axes, a name that cannot be written, or over the limits; for a `wire`
            other than float32 also NaN, infinity and what would become infinite.
    """
    if not tensors and not metadata:
        return b""
    if len(tensors) > MAX_TENSORS:
        raise DataError(f"the adapter has {len(tensors)} tensors", fix=f"the limit is {MAX_TENSORS}")
    stored: list[tuple[str, str, NDArray[Any]]] = []
    for name in sorted(tensors):
        _check_name(name)
        value = tensors[name]
        if value.dtype != np.float32 or value.ndim > MAX_NDIM:
            raise DataError(
                f"adapter tensor {name} is {value.dtype} with {value.ndim} axes",
                fix=f"adapters are float32 with at most {MAX_NDIM} axes",
            )
        stored += _encoded(name, value, wire)
    stored.sort(key=lambda tensor: (tensor[1] == "I8", tensor[0]))  # scales first, so that every tensor is aligned
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    parts: list[bytes | memoryview] = []
    end = 0
    for name, dtype, array in stored:
        start, end = end, end + array.nbytes
        header[name] = {"dtype": dtype, "shape": list(array.shape), "data_offsets": [start, end]}
        parts.append(np.asarray(array, dtype=_STORED[dtype], order="C").reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or 8 + len(text) + end > MAX_BYTES:
        raise DataError(f"the adapter has {8 + len(text) + end} bytes", fix=f"the limit is {MAX_BYTES}")
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def _encoded(name: str, value: NDArray[np.float32], wire: str) -> list[tuple[str, str, NDArray[Any]]]:
    """Name, dtype and stored array of one tensor, and of its scales."""
    if wire == "float32":
        return [(name, "F32", value)]
    require_finite({name: value})
    if wire == "bfloat16":
        upper = to_bfloat16(value)
        if value.size and (upper & np.uint16(0x7FFF)).max() >= 0x7F80:
            raise DataError(f"adapter tensor {name} is too large for bfloat16", fix="the sender must not release it")
        return [(name, "BF16", upper.reshape(value.shape))]
    if name.endswith(SCALE):
        raise DataError(f"adapter tensor {name} has the name of a scale", fix=f"no tensor's name ends in {SCALE}")
    quantised, scales = to_int8(value)
    return [(name, "I8", quantised.reshape(value.shape)), (name + SCALE, "F32", scales)]


def _check_name(name: str, longest: int = MAX_NAME) -> None:
    if not 0 < len(name) <= longest or not name.isprintable() or name == "__metadata__":
        raise DataError(f"adapter tensor {shown(name)} has no usable name", fix=f"1 to {MAX_NAME} printable characters")


def _header(data: Buffer) -> tuple[dict[str, Any], int]:
    """The header and where the tensors begin; refuses, before anything is allocated, what is too large."""
    if len(data) > MAX_BYTES:
        raise DataError(f"the adapter has {len(data)} bytes", fix=f"the limit is {MAX_BYTES}")
    if len(data) < 8:
        raise DataError(f"the adapter has {len(data)} bytes, too few for a header", fix="send safetensors")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise DataError(f"the adapter's header claims {size} bytes", fix="send whole safetensors")
    try:
        header = parse_json(bytes(data[8 : 8 + size]), "the adapter's header", limit=MAX_HEADER_BYTES)
    except ConfigError as error:
        raise DataError(error.message, fix="send safetensors") from error
    if not isinstance(header, dict):
        raise DataError("the adapter's header is not an object", fix="send safetensors")
    return header, 8 + size


def _metadata(header: dict[str, Any]) -> dict[str, str]:
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise DataError("the adapter's metadata is no table of texts", fix="send safetensors")
    return metadata


def metadata(data: Buffer) -> dict[str, str]:
    """The metadata of an adapter's bytes; DataError when they are no safetensors."""
    return _metadata(_header(data)[0]) if data else {}


def _entries(header: dict[str, Any], room: int, allowed: tuple[str, ...]) -> dict[str, _Entry]:
    """The tensors that the header describes: they fill `room` bytes without gap or overlap."""
    if len(header) > MAX_TENSORS * len(allowed):
        raise DataError(f"the adapter has {len(header)} tensors", fix=f"the limit is {MAX_TENSORS}")
    entries: dict[str, _Entry] = {}
    for name, entry in header.items():
        _check_name(name, MAX_NAME + len(SCALE) * ("I8" in allowed))
        if not isinstance(entry, dict) or entry.get("dtype") not in allowed:
            raise DataError(f"adapter tensor {name} is not {' or '.join(allowed)}", fix="send the spec's wire format")
        shape, offsets = entry.get("shape"), entry.get("data_offsets")
        # Extents beside a zero hold no bytes, and numpy takes no array whose other ones are beyond all bounds.
        if not _whole_numbers(shape) or len(shape) > MAX_NDIM or math.prod(length or 1 for length in shape) > MAX_BYTES:
            raise DataError(f"adapter tensor {name} has shape {shown(shape)}", fix=f"at most {MAX_NDIM} axes")
        if not _whole_numbers(offsets) or len(offsets) != 2 or len(entry) != 3:
            raise DataError(f"adapter tensor {name} has offsets {shown(offsets)}", fix="send safetensors")
        entries[name] = _Entry(name, entry["dtype"], tuple(shape), offsets[0], offsets[1])
    end = 0
    for tensor in sorted(entries.values(), key=lambda tensor: (tensor.start, tensor.end)):
        if tensor.start != end or tensor.end - tensor.start != math.prod(tensor.shape) * _STORED[tensor.dtype].itemsize:
            raise DataError(
                f"adapter tensor {tensor.name} of shape {shown(list(tensor.shape))} lies at "
                f"{tensor.start} to {tensor.end}",
                fix="send whole safetensors, without gaps",
            )
        end = tensor.end
    if end != room:
        raise DataError(f"the adapter has {room} bytes of tensors, its header {end}", fix="send it again, whole")
    return entries


def _whole_numbers(value: Any) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(number) is int and number >= 0 for number in value)


def read_adapter(path: Path) -> bytes:
    """The bytes of the file that a person named; ConfigError unless it can be read, DataError if it is no adapter.

    Between sites and coordinator no bytes stand for a run's start. In a file they are a copy that failed.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", fix="give the adapter's file, --adapter FILE") from None
    if not unpack(data):
        raise DataError(f"{path} holds no tensor", fix="export the adapter again: fl-admin adapters export")
    return data


def unpack(data: Buffer, *, wire: str = "float32") -> Tensors:
    """The float32 tensors of an adapter; no bytes give no tensors.

    Float32 tensors are views of `data`, so nothing is copied and they must not be written to.

    Raises:
        DataError: not safetensors, too large, another form than `wire`, or too many axes.
    """
    if not data:
        return {}
    header, begin = _header(data)
    _metadata(header)
    entries = _entries(header, len(data) - begin, _ALLOWED[wire])
    stored = {name: _array(data, begin, entry) for name, entry in entries.items()}
    if wire == "float32":
        return stored
    if wire == "bfloat16":
        return {name: from_bfloat16(upper) for name, upper in stored.items()}
    return _from_int8(entries, stored)


def _array(data: Buffer, begin: int, entry: _Entry) -> NDArray[Any]:
    dtype = _STORED[entry.dtype]
    flat: NDArray[Any] = np.frombuffer(data, dtype=dtype, count=math.prod(entry.shape), offset=begin + entry.start)
    return np.require(flat, requirements="A").reshape(entry.shape)


def _from_int8(entries: Mapping[str, _Entry], stored: Mapping[str, NDArray[Any]]) -> Tensors:
    tensors: Tensors = {}
    for name, entry in entries.items():
        if entry.dtype != "I8":
            of = entries.get(name.removesuffix(SCALE))
            if of is None or not name.endswith(SCALE) or of.dtype != "I8":
                raise DataError(f"adapter tensor {name} is a scale of nothing", fix="send the spec's wire format")
            continue
        scales = stored.get(name + SCALE)
        if scales is None or scales.dtype.kind != "f" or scales.shape != (blocks(stored[name].size),):
            raise DataError(f"adapter tensor {name} has not one scale per block", fix="send the spec's wire format")
        if not (np.isfinite(scales).all() and (scales >= 0).all()):
            raise DataError(f"adapter tensor {name} has a scale that is no size", fix="the sender must not release it")
        tensors[name] = from_int8(stored[name].reshape(-1), scales).reshape(entry.shape)
    return tensors


def digest(data: Buffer) -> str:
    """`sha256:` and the SHA-256 of the adapter's bytes."""
    return f"sha256:{sha256_hex(data)}"


def shapes(tensors: Mapping[str, NDArray[np.float32]]) -> dict[str, tuple[int, ...]]:
    """Name to shape."""
    return {name: value.shape for name, value in tensors.items()}


def require_finite(tensors: Mapping[str, NDArray[np.float32]]) -> None:
    """DataError naming the first tensor that holds NaN or infinity."""
    for name, value in tensors.items():
        if not np.isfinite(value).all():
            raise DataError(f"adapter tensor {name} holds NaN or infinity", fix="the sender must not release it")


def require_same_shapes(tensors: Mapping[str, NDArray[np.float32]], expected: Mapping[str, tuple[int, ...]]) -> None:
    """DataError naming the first tensor that is missing, unexpected or of another shape."""
    for name in sorted(set(tensors) ^ set(expected)):
        problem = "is missing" if name in expected else "is not expected"
        raise DataError(f"adapter tensor {name} {problem}", fix="sender and receiver must use the same run spec")
    for name, value in tensors.items():
        if value.shape != tuple(expected[name]):
            raise DataError(
                f"adapter tensor {name} has shape {value.shape}, expected {tuple(expected[name])}",
                fix="sender and receiver must use the same run spec",
            )
