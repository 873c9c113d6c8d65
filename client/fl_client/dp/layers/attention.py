"""Attention inside each record of a packed micro-batch, as an attention implementation of transformers.

Every run of records of one length is a batch of its own, causal, with no mask that follows from the neighbours. The
kernels compute each record and head by itself, so that its result does not depend on how many lie beside it; the
checks at start-up hold this machine's kernels to that (`fl_client.dp.invariance`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import attention as kernels
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fl_client.dp.records.packing import Packed
from fl_shared.errors import EngineError

NAME = "concordat_runs"
_current: ContextVar[Packed] = ContextVar("packed")
_recorded: ContextVar[set[Shape] | None] = ContextVar("recorded", default=None)
_KNOWN = {"position_ids", "use_cache", "output_attentions", "output_router_logits", "sliding_window", "cache_position"}


class Shape(NamedTuple):
    """What a layer asks of `causal`: heads of queries and of keys, widths of these and of values, and how they meet."""

    heads: int
    groups: int
    width: int
    wide: int
    scaling: float | None
    window: int | None


@contextlib.contextmanager
def recorded_shapes() -> Iterator[set[Shape]]:
    """Note what the layers ask for, as long as the context lasts."""
    shapes: set[Shape] = set()
    token = _recorded.set(shapes)
    try:
        yield shapes
    finally:
        _recorded.reset(token)


@contextlib.contextmanager
def packed_attention(config: Any, batch: Packed) -> Iterator[None]:
    """Let the model of this config attend within the records of `batch`, for as long as the context lasts."""
    before, token = config._attn_implementation, _current.set(batch)
    config._attn_implementation = NAME
    try:
        yield
    finally:
        config._attn_implementation = before
        _current.reset(token)


def attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **rest: Any,
) -> tuple[Tensor, None]:
    """Queries `[1, h, M, d]`, keys `[1, k, M, d]` and values `[1, k, M, e]` to `[1, M, h, e]`; filler gets zeros.

    Raises:
        EngineError: the model asks for something that this attention does not know, dropout or a mask among it.
    """
    batch = _current.get()
    odd = [name for name, option in rest.items() if name not in _KNOWN and option is not None and option is not False]
    if odd or dropout or attention_mask is not None or not getattr(module, "is_causal", True):
        raise EngineError(
            f"the attention of {type(module).__name__} wants {', '.join(odd) or 'dropout, a mask or no causality'}",
            fix="private training does not support this architecture",
        )
    window = rest.get("sliding_window")
    if (recorded := _recorded.get()) is not None:
        recorded.add(Shape(query.shape[1], key.shape[1], query.shape[3], value.shape[3], scaling, window))
    parts = [projection[0].split(batch.lengths, dim=1) for projection in (query, key, value)]
    outputs = []
    for (tokens, count), q, k, v in zip(batch.runs, *parts, strict=False):
        q, k, v = (part.unflatten(1, (count, tokens)).transpose(0, 1) for part in (q, k, v))
        outputs.append(causal(q, k, v, scaling, window).transpose(1, 2).flatten(0, 1))
    filler = query.new_zeros(batch.lengths[-1], query.shape[1], value.shape[-1])
    return torch.cat([*outputs, filler]).unsqueeze(0), None


def causal(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, window: int | None) -> Tensor:
    """`[n, h, L, d]`, `[n, k, L, d]`, `[n, k, L, e]` to `[n, h, L, e]`."""
    tokens, width, wide = query.shape[2], query.shape[3], value.shape[3]
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if scaling is None:
        scaling = width**-0.5
    if wide < width:  # the fused kernels want equal widths
        value = F.pad(value, (0, width - wide))
    mask = None
    if window is not None and window < tokens:
        place = torch.arange(tokens, device=query.device)
        apart = place.unsqueeze(1) - place
        mask = (apart >= 0) & (apart < window)
    with kernels.sdpa_kernel(_KERNELS[query.device.type]):
        output: Tensor = F.scaled_dot_product_attention(
            query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling
        )
    return output[..., :wide]


# On CUDA cuDNN's and Flash's backward passes may add in any order; this one does not under deterministic algorithms.
_KERNELS = {
    "cpu": [kernels.SDPBackend.FLASH_ATTENTION, kernels.SDPBackend.MATH],
    "cuda": [kernels.SDPBackend.EFFICIENT_ATTENTION, kernels.SDPBackend.MATH],
}
ALL_ATTENTION_FUNCTIONS.register(NAME, attend)
