"""Frozen int8 layers: a linear map and a set of routed experts, dequantised when they are used.

Symmetric group quantisation along the input: `w = qweight * scale[group]`, one float32 scale per 128 inputs (a shorter
last group where the input is no multiple of 128). torchao has no group-128 for 3-D experts and bitsandbytes scales per
row, so these two layers are our own. The backward pass dequantises again instead of keeping a float copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GROUP = 128


def quantise_tensor(weight: Tensor, group: int = GROUP, bits: int = 8) -> tuple[Tensor, Tensor]:
    """Quantise along the last axis.

    Args:
        weight: `[..., out, in]`, any float type.
        group: inputs that share a scale.
        bits: 8, or 4 (values from -7 to 7, still one per byte in memory).

    Returns:
        int8 `[..., out, in]` and float32 scales `[..., out, ceil(in / group)]`.
    """
    top = 2 ** (bits - 1) - 1
    inputs = weight.shape[-1]
    groups = -(-inputs // group)
    padded = F.pad(weight.float(), (0, groups * group - inputs)).unflatten(-1, (groups, group))
    scale = padded.abs().amax(-1) / top
    safe = torch.where(scale > 0, scale, torch.ones_like(scale))
    values = torch.round(padded / safe.unsqueeze(-1)).clamp_(-top, top).to(torch.int8)
    return values.flatten(-2)[..., :inputs].contiguous(), scale


def dequantise(qweight: Tensor, scale: Tensor, group: int, dtype: torch.dtype) -> Tensor:
    """The float weight `[..., out, in]` of `quantise_tensor`'s pair."""
    inputs = qweight.shape[-1]
    if inputs % group == 0:
        weight = qweight.unflatten(-1, (inputs // group, group)).to(dtype)
        scaled: Tensor = weight.mul_(scale.unsqueeze(-1).to(dtype)).flatten(-2)
        return scaled
    return qweight.to(dtype).mul_(scale.to(dtype).repeat_interleave(group, dim=-1)[..., :inputs])


class _QuantMatmul(torch.autograd.Function):
    """y = x W^T for a frozen quantised W; gradient with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qweight: Tensor, scale: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(qweight, scale)
        ctx.group = group
        return x @ dequantise(qweight, scale, group, x.dtype).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        qweight, scale = ctx.saved_tensors
        return grads[0] @ dequantise(qweight, scale, ctx.group, grads[0].dtype), None, None, None


class _QuantGroupedMatmul(torch.autograd.Function):
    """y_e = x_e W_e^T for rows sorted by expert; gradient with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, qweight: Tensor, scale: Tensor, ends: Tensor, group: int) -> Tensor:
        ctx.save_for_backward(qweight, scale, ends)
        ctx.group = group
        return grouped_matmul(x, dequantise(qweight, scale, group, x.dtype).mT, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        qweight, scale, ends = ctx.saved_tensors
        weight = dequantise(qweight, scale, ctx.group, grads[0].dtype)
        return grouped_matmul(grads[0].contiguous(), weight, ends), None, None, None, None


def grouped_matmul(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x[ends[e-1]:ends[e]] @ weight[e]` for every e.

    Args:
        x: `[M, in]`, rows sorted by group.
        weight: `[E, in, out]`.
        ends: int32 `[E]`, the end of each group; the last one is M.

    Returns:
        `[M, out]`.
    """
    inner, out = weight.shape[1:]
    lane = 16 // x.element_size()
    if inner % lane or out % lane:  # the kernel wants rows of whole 16 bytes; a LoRA rank may be anything
        x = F.pad(x, (0, -inner % lane))
        weight = F.pad(weight, (0, -out % lane, 0, -inner % lane))
        return F.grouped_mm(x, weight, offs=ends)[:, :out]
    return F.grouped_mm(x, weight, offs=ends)


class QuantLinear(nn.Module):
    """A frozen linear layer with int8 weights.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        group: inputs that share a scale.
        config: ignored; PEFT hands one to every custom layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group: int = GROUP,
        config: Any = None,  # noqa: ARG002
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group = in_features, out_features, group
        groups = -(-in_features // group)
        self.qweight = _frozen(torch.empty(out_features, in_features, dtype=torch.int8, device=device))
        self.scale = _frozen(torch.empty(out_features, groups, device=device))
        self.bias = _frozen(torch.empty(out_features, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, group: int = GROUP) -> QuantLinear:
        """Quantise a float layer."""
        made = cls(linear.in_features, linear.out_features, linear.bias is not None, group)
        qweight, scale = quantise_tensor(linear.weight.detach(), group)
        made.qweight, made.scale = _frozen(qweight), _frozen(scale)
        if linear.bias is not None:
            made.bias = _frozen(linear.bias.detach().float().clone())
        return made

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = _QuantMatmul.apply(x, self.qweight, self.scale, self.group)  # type: ignore[no-untyped-call]
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, group={self.group}"


class QuantExperts(nn.Module):
    """Frozen routed experts with int8 weights, in Hugging Face's fused layout.

    Args:
        num_experts: E.
        hidden: H, the width of the residual stream.
        intermediate: I, the width inside one expert.
        group: inputs that share a scale.
        act_fn: the gate's activation.
        config: ignored; PEFT hands one to every custom layer.
    """

    def __init__(
        self,
        num_experts: int,
        hidden: int,
        intermediate: int,
        group: int = GROUP,
        act_fn: Any = F.silu,
        config: Any = None,  # noqa: ARG002
        device: Any = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.intermediate, self.group = num_experts, hidden, intermediate, group
        self.act_fn = act_fn
        for name, out, inputs in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
            q = torch.empty(num_experts, out, inputs, dtype=torch.int8, device=device)
            setattr(self, f"{name}_qweight", _frozen(q))
            setattr(
                self, f"{name}_scale", _frozen(torch.empty(num_experts, out, -(-inputs // group), device=device))
            )

    @classmethod
    def from_fused(cls, gate_up_proj: Tensor, down_proj: Tensor, act_fn: Any, group: int = GROUP) -> QuantExperts:
        """Quantise float experts `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`."""
        experts, hidden, intermediate = down_proj.shape
        made = cls(experts, hidden, intermediate, group, act_fn)
        for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
            qweight, scale = quantise_tensor(weight.detach(), group)
            setattr(made, f"{name}_qweight", _frozen(qweight))
            setattr(made, f"{name}_scale", _frozen(scale))
        return made

    def project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """`gate_up_proj` or `down_proj` for rows sorted by expert: `[M, in]` to `[M, out]`."""
        qweight, scale = getattr(self, f"{name}_qweight"), getattr(self, f"{name}_scale")
        y: Tensor = _QuantGroupedMatmul.apply(x, qweight, scale, ends, self.group)  # type: ignore[no-untyped-call]
        return y

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Every token through its experts; none is dropped.

        Args:
            hidden_states: `[T, H]`.
            top_k_index: `[T, K]`, the experts of each token.
            top_k_weights: `[T, K]`.

        Returns:
            `[T, H]`.
        """
        order, tokens, ends = sort_by_expert(top_k_index, self.num_experts)
        gate, up = self.project("gate_up_proj", hidden_states[tokens], ends).chunk(2, dim=-1)
        out = self.project("down_proj", self.act_fn(gate) * up, ends)
        weighted = out * top_k_weights.reshape(-1)[order].unsqueeze(-1).to(out.dtype)
        return torch.zeros_like(hidden_states).index_add_(0, tokens, weighted.to(hidden_states.dtype))

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden={self.hidden}, "
            f"intermediate={self.intermediate}, group={self.group}"
        )


def sort_by_expert(top_k_index: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Sort the (token, expert) pairs by expert.

    Args:
        top_k_index: `[T, K]`.
        num_experts: E.

    Returns:
        order `[T*K]` into the flattened pairs, token of each sorted pair `[T*K]`, int32 ends `[E]` of each expert.
    """
    flat = top_k_index.reshape(-1)
    order = torch.argsort(flat, stable=True)
    ends = torch.cumsum(torch.bincount(flat, minlength=num_experts), 0).to(torch.int32)
    return order, order // top_k_index.shape[-1], ends


def _frozen(value: Tensor) -> nn.Parameter:
    """A parameter without gradient: PEFT finds parameters, not buffers, when it replaces a layer."""
    return nn.Parameter(value, requires_grad=False)
