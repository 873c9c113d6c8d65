"""Group-quantised weights: int8, or int4 packed two to a byte, with one float32 scale per 128 inputs of a row.

`w = q * scale[group]`, symmetric, along the input; the last group is shorter where the input is no multiple of 128.
int8 holds -127..127 with `scale = max|w| / 127`. int4 holds -8..7; its scale may be negative, so that the level -8
serves the side where the group's largest weight lies, and is the best of three (least squared error).

An int4 group of L inputs takes ceil(L / 2) bytes: byte j holds input j in its low nibble and input j + ceil(L / 2) in
its high one, both plus nothing (two's complement). Unpacking writes two runs, never every other element.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F

GROUP = 128
# Scales tried for int4: the group's largest weight lands on -8, or up to two levels beyond it and is clipped.
_INT4_DIVISORS = (8.0, 9.0, 10.0)
_LEAST_RUN = 32  # weights multiplied by one scale at a time; shorter runs cost more than a second pass


def quantise_tensor(weight: Tensor, group: int = GROUP, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantise along the last axis.

    Args:
        weight: `[..., out, in]`, any float type.
        group: inputs that share a scale; even for 4 bits.
        bits: 8 or 4.

    Returns:
        int8 `[..., out, in]` or, for 4 bits, uint8 `[..., out, packed_width(in, group)]`; and float32 scales
        `[..., out, ceil(in / group)]`.
    """
    inputs = weight.shape[-1]
    groups = -(-inputs // group)
    padded = F.pad(weight.float(), (0, groups * group - inputs)).unflatten(-1, (groups, group))
    if bits == 4:
        values, scale = _int4(padded)
        return _pack(values.flatten(-2)[..., :inputs], group), scale
    scale = padded.abs().amax(-1) / 127
    values = torch.round(padded / _without_zeros(scale).unsqueeze(-1)).clamp_(-127, 127).to(torch.int8)
    return values.flatten(-2)[..., :inputs].contiguous(), scale


def _int4(padded: Tensor) -> tuple[Tensor, Tensor]:
    """Levels `[..., groups, group]` (int8) and scales `[..., groups]` of least squared error among the candidates."""
    largest = torch.gather(padded, -1, padded.abs().argmax(-1, keepdim=True)).squeeze(-1)
    best: tuple[Tensor, Tensor, Tensor] | None = None
    for divisor in _INT4_DIVISORS:
        scale = -largest / divisor
        values = torch.round(padded / _without_zeros(scale).unsqueeze(-1)).clamp_(-8, 7)
        error = (values * scale.unsqueeze(-1) - padded).square_().sum(-1)
        if best is None:
            best = values, scale, error
            continue
        better = error < best[2]
        best = (
            torch.where(better.unsqueeze(-1), values, best[0]),
            torch.where(better, scale, best[1]),
            torch.where(better, error, best[2]),
        )
    assert best is not None  # noqa: S101  # there are three candidates
    return best[0].to(torch.int8), best[1]


def _without_zeros(scale: Tensor) -> Tensor:
    return torch.where(scale != 0, scale, torch.ones_like(scale))


def packed_width(inputs: int, group: int) -> int:
    """Bytes of an int4 row of `inputs` weights."""
    whole, rest = divmod(inputs, group)
    return whole * (group // 2) + -(-rest // 2)


def _runs(inputs: int, group: int) -> list[tuple[int, int, int]]:
    """(inputs, first group, groups) of the whole groups and of the shorter last one; none of them empty."""
    whole, rest = divmod(inputs, group)
    return [run for run in ((group, 0, whole), (rest, whole, 1)) if run[0] * run[2] > 0]


def _pack(values: Tensor, group: int) -> Tensor:
    inputs = values.shape[-1]
    packed = []
    for length, first, groups in _runs(inputs, group):
        half = -(-length // 2)
        run = values[..., first * group : first * group + groups * length].unflatten(-1, (groups, length))
        low, high = run[..., :half], F.pad(run[..., half:], (0, 2 * half - length))
        packed.append(((low & 15) | (high << 4)).flatten(-2))
    return torch.cat(packed, -1).view(torch.uint8)


def dequantise(
    qweight: Tensor,
    scale: Tensor,
    group: int,
    dtype: torch.dtype,
    inputs: int | None = None,
    *,
    out: Tensor | None = None,
) -> Tensor:
    """The float weight `[..., out, in]` of `quantise_tensor`'s pair.

    Args:
        qweight, scale: the pair, contiguous; uint8 means int4.
        group: inputs that share a scale.
        dtype: of the result.
        inputs: in; needed only for int4 with an odd number of inputs.
        out: a contiguous tensor of the result's shape and type to write to.
    """
    packed = qweight.dtype == torch.uint8
    if inputs is None:
        inputs = _unpacked_width(qweight.shape[-1], group) if packed else qweight.shape[-1]
    if out is None:
        out = torch.empty(*qweight.shape[:-1], inputs, dtype=dtype, device=qweight.device)
    width = math.gcd(inputs, group)
    if not packed and width >= _LEAST_RUN:  # the common case, in as few calls as possible: layers can be small
        if width < group:  # cut every group into runs that divide the last one, too: 576 = 9 x 64
            runs = torch.arange(0, inputs, width, device=scale.device) // group
            scale = scale.index_select(-1, runs)
        out.view(-1, width).copy_(qweight.view(-1, width)).mul_(scale.view(-1, 1).to(dtype))
        return out
    # Each nibble stays in (or moves to) the upper half of its byte: 16 x its value, exact, without a shift back.
    factors = ((scale / 16) if packed else scale).unsqueeze(-1).to(dtype)
    if not packed:
        out.copy_(qweight)
    signed = qweight.view(torch.int8)
    at = 0
    for length, first, groups in _runs(inputs, group):
        part = _groups(out, first * group, groups, length)
        if packed:
            half = -(-length // 2)
            pairs = _groups(signed, at, groups, half)
            at += groups * half
            part[..., :half] = pairs << 4
            part[..., half:] = (pairs & -16)[..., : length - half]
        part.mul_(factors[..., first : first + groups, :])
    return out


def _groups(values: Tensor, start: int, groups: int, length: int) -> Tensor:
    """`[..., n]` to `[..., groups, length]`, from `start` on."""
    return values.narrow(-1, start, groups * length).view(*values.shape[:-1], groups, length)


def _unpacked_width(width: int, group: int) -> int:
    whole, rest = divmod(width, group // 2)
    return whole * group + 2 * rest
