"""Opacus grad samplers for the layers of ours that hold parameters: the oracle's side, plain and slow."""

from __future__ import annotations

import functools

import torch
from opacus.grad_sample import compute_linear_grad_sample, register_grad_sampler
from opacus.grad_sample.linear import compute_linear_norm_sample
from opacus.grad_sample.utils import register_norm_sampler
from torch import Tensor, nn

from fl_client.dp.layers.head import PooledLinear
from fl_client.dp.layers.lora import ExpertFactor


@functools.cache
def register() -> None:
    """Make the samplers known to Opacus, once per process."""
    register_grad_sampler(ExpertFactor)(expert_factor_samples)
    register_grad_sampler(PooledLinear)(compute_linear_grad_sample)
    register_norm_sampler(ExpertFactor)(expert_factor_norms)
    register_norm_sampler(PooledLinear)(compute_linear_norm_sample)


def expert_factor_samples(
    layer: ExpertFactor, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Per-record gradients `[B, E, out, in]`: every row's outer product is added to its record and expert."""
    x, ends, record, anchor = activations
    experts, out, inputs = layer.weight.shape
    samples = x.new_zeros(experts, anchor.shape[0], out, inputs)
    start = 0
    for expert, end in enumerate(ends.tolist()):
        rows = slice(start, end)
        samples[expert].index_add_(0, record[rows], torch.einsum("mo,mi->moi", backprops[rows], x[rows]))
        start = end
    return {layer.weight: samples.transpose(0, 1).contiguous()}


def expert_factor_norms(
    layer: ExpertFactor, activations: list[Tensor], backprops: Tensor
) -> dict[nn.Parameter, Tensor]:
    """Per-record gradient norms `[B]`.

    `|sum_i g_i (x) x_i|^2 = sum_ij <g_i, g_j> <x_i, x_j>` over the rows of one expert and record.
    """
    x, ends, record, anchor = activations
    squared = x.new_zeros(anchor.shape[0])
    start = 0
    for end in ends.tolist():
        rows = slice(start, end)
        same = record[rows].unsqueeze(0) == record[rows].unsqueeze(1)
        pairs = (backprops[rows] @ backprops[rows].mT) * (x[rows] @ x[rows].mT) * same
        squared.index_add_(0, record[rows], pairs.sum(1))
        start = end
    return {layer.weight: squared.clamp(min=0).sqrt()}
