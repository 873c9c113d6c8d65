"""LoRA adapters as bytes: safetensors of float32 tensors, with hard limits, never pickle."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load

from fl_shared.canonical import parse_json, sha256_hex
from fl_shared.errors import ConfigError, DataError, shown

Tensors = dict[str, NDArray[np.float32]]

MAX_BYTES = 4 << 30
MAX_HEADER_BYTES = 16 << 20
MAX_TENSORS = 100_000
MAX_NDIM = 3
MAX_NAME = 512


def pack(tensors: Mapping[str, NDArray[np.float32]], metadata: Mapping[str, str] | None = None) -> bytes:
    """Safetensors bytes of float32 tensors: equal tensors and metadata give equal bytes, on every machine.

    An empty adapter without metadata packs to no bytes at all. The header is written here, because the
    safetensors library puts metadata in an order that differs from process to process.

    Raises:
        DataError: another dtype, more than 3 axes, a name that cannot be written, or over the limits.
    """
    if not tensors and not metadata:
        return b""
    if len(tensors) > MAX_TENSORS:
        raise DataError(f"the adapter has {len(tensors)} tensors", fix=f"the limit is {MAX_TENSORS}")
    header: dict[str, object] = {"__metadata__": dict(sorted(metadata.items()))} if metadata else {}
    parts: list[bytes | memoryview] = []
    end = 0
    for name in sorted(tensors):
        value = tensors[name]
        _check_name(name)
        if value.dtype != np.float32 or value.ndim > MAX_NDIM:
            raise DataError(
                f"adapter tensor {name} is {value.dtype} with {value.ndim} axes",
                fix=f"adapters are float32 with at most {MAX_NDIM} axes",
            )
        start, end = end, end + value.nbytes
        header[name] = {"dtype": "F32", "shape": list(value.shape), "data_offsets": [start, end]}
        parts.append(np.asarray(value, dtype="<f4", order="C").reshape(-1).view(np.uint8).data)
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER_BYTES or 8 + len(text) + end > MAX_BYTES:
        raise DataError(f"the adapter has {8 + len(text) + end} bytes", fix=f"the limit is {MAX_BYTES}")
    return b"".join([struct.pack("<Q", len(text)), text, *parts])


def _check_name(name: str) -> None:
    if not 0 < len(name) <= MAX_NAME or not name.isprintable() or name == "__metadata__":
        raise DataError(f"adapter tensor {shown(name)} has no usable name", fix=f"1 to {MAX_NAME} printable characters")


def _header(data: bytes) -> None:
    """Refuse, before anything is allocated, what the library would let through."""
    if len(data) > MAX_BYTES:
        raise DataError(f"the adapter has {len(data)} bytes", fix=f"the limit is {MAX_BYTES}")
    if len(data) < 8:
        raise DataError(f"the adapter has {len(data)} bytes, too few for a header", fix="send safetensors")
    (size,) = struct.unpack("<Q", data[:8])
    if size > min(MAX_HEADER_BYTES, len(data) - 8):
        raise DataError(f"the adapter's header claims {size} bytes", fix="send whole safetensors")
    try:
        header = parse_json(data[8 : 8 + size], "the adapter's header", limit=MAX_HEADER_BYTES)
    except ConfigError as error:
        raise DataError(error.message, fix="send safetensors") from error
    if not isinstance(header, dict):
        raise DataError("the adapter's header is not an object", fix="send safetensors")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise DataError(f"the adapter has {len(header)} tensors", fix=f"the limit is {MAX_TENSORS}")
    for name, entry in header.items():
        _check_name(name)
        if not isinstance(entry, dict) or entry.get("dtype") != "F32":
            raise DataError(f"adapter tensor {name} is not float32", fix="send float32 tensors")
        shape = entry.get("shape")
        if not isinstance(shape, list) or len(shape) > MAX_NDIM:
            raise DataError(f"adapter tensor {name} has shape {shown(shape)}", fix=f"at most {MAX_NDIM} axes")


def unpack(data: bytes) -> Tensors:
    """The tensors of an adapter; no bytes give no tensors.

    Raises:
        DataError: not safetensors, too large, another dtype, or too many axes.
    """
    if not data:
        return {}
    _header(data)
    try:
        return load(data)
    except (SafetensorError, ValueError) as error:
        raise DataError(f"the adapter is no valid safetensors file: {error}", fix="send it again, whole") from error


def digest(data: bytes) -> str:
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
        what = "is missing" if name in expected else "is not expected"
        raise DataError(f"adapter tensor {name} {what}", fix="sender and receiver must use the same run spec")
    for name, value in tensors.items():
        if value.shape != tuple(expected[name]):
            raise DataError(
                f"adapter tensor {name} has shape {value.shape}, expected {tuple(expected[name])}",
                fix="sender and receiver must use the same run spec",
            )
