"""Frozen quantised layers: a linear map and a set of routed experts, dequantised when they are used.

torchao has no group-128 for 3-D experts and bitsandbytes scales per row, so these two layers are our own. The backward
pass dequantises again instead of keeping a float copy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_client.model.quantised import matmul as quant_matmul
from fl_client.model.quantised.tensor import GROUP, dequantise, packed_width, quantise_tensor

__all__ = [
    "QuantExperts",
    "QuantLinear",
    "dequantise",
    "quantise_tensor",
]


class _QuantMatmul(torch.autograd.Function):
    """y = x W^T for a frozen quantised W; gradient with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantLinear) -> Tensor:
        ctx.layer, ctx.shape = layer, x.shape
        return layer.matmul(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], layer.out_features)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None]:
        rows = grads[0].reshape(-1, grads[0].shape[-1])
        return ctx.layer.matmul_transposed(rows).view(ctx.shape), None


class _QuantGroupedMatmul(torch.autograd.Function):
    """y_e = x_e W_e^T for rows sorted by expert; gradient with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantExperts, name: str, ends: Tensor) -> Tensor:
        ctx.save_for_backward(ends)
        ctx.layer, ctx.name = layer, name
        return layer.matmul(name, x, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        (ends,) = ctx.saved_tensors
        return ctx.layer.matmul_transposed(ctx.name, grads[0].contiguous(), ends), None, None, None


class QuantLinear(nn.Module):
    """A frozen linear layer with int8 or int4 weights.

    Args:
        in_features, out_features, bias: as `nn.Linear`.
        group: inputs that share a scale.
        bits: 8 or 4.
        config: ignored; PEFT hands one to every custom layer.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = False,
        group: int = GROUP,
        bits: int = 8,
        config: Any = None,  # noqa: ARG002
        device: Any = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features, self.group, self.bits = in_features, out_features, group, bits
        self.qweight, self.scale = _empty((out_features,), in_features, group, bits, device)
        self.bias = _frozen(torch.empty(out_features, device=device)) if bias else None

    @classmethod
    def from_linear(cls, linear: nn.Linear, group: int = GROUP, bits: int = 8) -> QuantLinear:
        """Quantise a float layer."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, group, bits, device="meta")
        qweight, scale = quantise_tensor(linear.weight.detach(), group, bits)
        layer.qweight, layer.scale = _frozen(qweight), _frozen(scale)
        if linear.bias is not None:
            layer.bias = _frozen(linear.bias.detach().float().clone())
        return layer

    def weight_as(self, dtype: torch.dtype) -> Tensor:
        """The whole float weight `[out, in]`, made again at each call."""
        return dequantise(self.qweight, self.scale, self.group, dtype, self.in_features)

    def matmul(self, x: Tensor) -> Tensor:
        """`x W^T` outside autograd and without the bias: `[M, in]` to `[M, out]`."""
        return quant_matmul.matmul(x, self.qweight, self.scale, self.group, self.in_features)

    def matmul_transposed(self, g: Tensor) -> Tensor:
        """`g W` outside autograd: `[M, out]` to `[M, in]`."""
        return quant_matmul.matmul_transposed(g, self.qweight, self.scale, self.group, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        y: Tensor = _QuantMatmul.apply(x, self)  # type: ignore[no-untyped-call]  # torch's
        return y if self.bias is None else y + self.bias.to(y.dtype)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bits={self.bits}, group={self.group}"


class QuantExperts(nn.Module):
    """Frozen routed experts with int8 or int4 weights, in Hugging Face's fused layout.

    Args:
        num_experts: E.
        hidden: H, the width of the residual stream.
        intermediate: I, the width inside one expert.
        group: inputs that share a scale.
        bits: 8 or 4.
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
        bits: int = 8,
        config: Any = None,  # noqa: ARG002
        device: Any = None,
    ) -> None:
        super().__init__()
        self.num_experts, self.hidden, self.intermediate, self.group = num_experts, hidden, intermediate, group
        self.act_fn, self.bits = act_fn, bits
        for name, out, inputs in (("gate_up_proj", 2 * intermediate, hidden), ("down_proj", hidden, intermediate)):
            qweight, scale = _empty((num_experts, out), inputs, group, bits, device)
            setattr(self, f"{name}_qweight", qweight)
            setattr(self, f"{name}_scale", scale)

    @classmethod
    def from_fused(
        cls, gate_up_proj: Tensor, down_proj: Tensor, act_fn: Any, group: int = GROUP, bits: int = 8
    ) -> QuantExperts:
        """Quantise float experts `gate_up_proj [E, 2I, H]`, `down_proj [E, H, I]`."""
        experts, hidden, intermediate = down_proj.shape
        layer = cls(experts, hidden, intermediate, group, act_fn, bits, device="meta")
        for name, weight in (("gate_up_proj", gate_up_proj), ("down_proj", down_proj)):
            qweight, scale = quantise_tensor(weight.detach(), group, bits)
            setattr(layer, f"{name}_qweight", _frozen(qweight))
            setattr(layer, f"{name}_scale", _frozen(scale))
        return layer

    def _stored(self, name: str) -> tuple[Tensor, Tensor, int]:
        """Quantised weight, scale and inputs of `gate_up_proj` or `down_proj`."""
        inputs = self.hidden if name == "gate_up_proj" else self.intermediate
        return getattr(self, f"{name}_qweight"), getattr(self, f"{name}_scale"), inputs

    def weight_as(self, name: str, dtype: torch.dtype) -> Tensor:
        """The whole float weight of `gate_up_proj` `[E, 2I, H]` or `down_proj` `[E, H, I]`, made again at each call."""
        qweight, scale, inputs = self._stored(name)
        return dequantise(qweight, scale, self.group, dtype, inputs)

    def matmul(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """`x_e W_e^T` outside autograd for rows sorted by expert: `[M, in]` to `[M, out]`."""
        qweight, scale, inputs = self._stored(name)
        return quant_matmul.grouped(x, qweight, scale, ends, self.group, inputs)

    def matmul_transposed(self, name: str, g: Tensor, ends: Tensor) -> Tensor:
        """`g_e W_e` outside autograd: `[M, out]` to `[M, in]`."""
        qweight, scale, inputs = self._stored(name)
        return quant_matmul.grouped_transposed(g, qweight, scale, ends, self.group, inputs)

    def project(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """`gate_up_proj` or `down_proj` for rows sorted by expert: `[M, in]` to `[M, out]`."""
        y: Tensor = _QuantGroupedMatmul.apply(x, self, name, ends)  # type: ignore[no-untyped-call]  # torch's
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
        gate, up = self.project("gate_up_proj", hidden_states.index_select(0, tokens), ends).chunk(2, dim=-1)
        out = self.project("down_proj", self.act_fn(gate) * up, ends)
        return weighted_sum(out, order, top_k_weights).to(hidden_states.dtype)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden={self.hidden}, intermediate={self.intermediate}, "
            f"bits={self.bits}, group={self.group}"
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


def weighted_sum(rows: Tensor, order: Tensor, top_k_weights: Tensor) -> Tensor:
    """Each token's sum over its experts: rows `[T*K, H]` sorted by expert and weights `[T, K]` to `[T, H]`."""
    pairs: Tensor = _Unsort.apply(rows, order)  # type: ignore[no-untyped-call]  # torch's
    weights = top_k_weights.unsqueeze(1).to(rows.dtype)
    return torch.bmm(weights, pairs.view(*top_k_weights.shape, rows.shape[-1])).squeeze(1)


class _Unsort(torch.autograd.Function):
    """The rows before sorting. Gathers both ways: a scatter of rows takes four times as long on CPU."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        inverse = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        return rows.index_select(0, inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        (order,) = ctx.saved_tensors
        return grads[0].index_select(0, order), None


def _empty(
    leading: tuple[int, ...], inputs: int, group: int, bits: int, device: Any
) -> tuple[nn.Parameter, nn.Parameter]:
    """Parameters for the quantised weight and its scales, not filled."""
    kind, width = (torch.uint8, packed_width(inputs, group)) if bits == 4 else (torch.int8, inputs)
    qweight = torch.empty(*leading, width, dtype=kind, device=device)
    return _frozen(qweight), _frozen(torch.empty(*leading, -(-inputs // group), device=device))


def _frozen(value: Tensor) -> nn.Parameter:
    """A parameter without gradient: PEFT finds parameters, not buffers, when it replaces a layer."""
    return nn.Parameter(value, requires_grad=False)
