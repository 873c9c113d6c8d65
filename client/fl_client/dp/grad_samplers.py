"""Opacus grad samplers for the layers of ours that hold parameters: the oracle's side, plain and slow."""

from __future__ import annotations

import functools

import torch
from opacus.grad_sample import compute_linear_grad_sample, register_grad_sampler
from torch import Tensor, nn

from fl_client.dp.adapt import Head
from fl_client.dp.lora_layers import ExpertFactor


@functools.cache
def register() -> None:
    """Make the samplers known to Opacus, once per process."""
    register_grad_sampler(ExpertFactor)(expert_factor_samples)
    register_grad_sampler(Head)(compute_linear_grad_sample)


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
