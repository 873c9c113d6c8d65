"""LoRA over frozen linear layers and frozen routed experts, float or int8, as PEFT layers.

Both layers put PEFT's factors `A` and `B` beside the frozen weight: `y = W x + scaling * B (A x)` (Hu et al. 2021,
arXiv 2106.09685, Section 4.1). One autograd function computes layer and factors together; in mode `book` its backward
pass leaves what each privacy unit contributed in the `GradientBook` instead of summing it.
"""

from __future__ import annotations

from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer
from torch import Tensor, nn
from torch.nn import functional as F

from fl_client.dp.layers.book import grouped_outer, outer
from fl_client.dp.layers.routing import Routing
from fl_client.dp.layers.scope import BatchScope
from fl_client.model.quantised.layers import QuantExperts, QuantLinear
from fl_client.model.quantised.matmul import grouped_matmul, grouped_rows
from fl_shared.errors import EngineError

ADAPTER = "default"
LANES = 4
"""Ranks are filled up to a multiple of this. MKL's kernels for narrow products (5, 6, 7, 9, 10 or 11 columns) add in an
order that follows a row's place; rows of whole 16 bytes are multiplied alike wherever they lie."""


def filled(weight: Tensor, *, rows: bool = False, columns: bool = False) -> Tensor:
    """`weight` `[..., p, q]` with zeros behind its rows, its columns or both, up to whole `LANES`: a rank's axes."""
    below, beside = -weight.shape[-2] % LANES * rows, -weight.shape[-1] % LANES * columns
    return F.pad(weight, (0, beside, 0, below)) if below or beside else weight


def narrowed(rows: Tensor, rank: int) -> Tensor:
    """Rows `[M, rank]` without what `filled` put behind them."""
    return rows if rows.shape[1] == rank else rows[:, :rank].contiguous()


class _LinearWithFactors(torch.autograd.Function):
    """`y = x W^T + scaling (x A^T) B^T`; the factors' gradients go to the book when there is one."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, a: nn.Parameter, b: nn.Parameter, layer: LoraLinear, scope: BatchScope) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        down, up = filled(a.to(rows.dtype), rows=True), filled(b.to(rows.dtype), columns=True)
        h = rows @ down.mT
        y = layer.base_matmul(rows)
        y.addmm_(h, up.mT, alpha=layer.factor)
        ctx.save_for_backward(rows, h)
        ctx.parameters, ctx.layer, ctx.book, ctx.shape = (a, b), layer, scope.book, x.shape
        return y.view(*x.shape[:-1], y.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, h = ctx.saved_tensors
        (a, b), factor = ctx.parameters, ctx.layer.factor
        g = grads[0].reshape(-1, grads[0].shape[-1])
        low = g @ filled(b.to(g.dtype), columns=True)
        low *= factor
        gx = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            gx = ctx.layer.base_matmul_transposed(g)
            gx.addmm_(low, filled(a.to(g.dtype), rows=True))
            gx = gx.view(ctx.shape)
        low, scaled = narrowed(low, a.shape[0]), narrowed(h * factor, a.shape[0])
        if ctx.book is not None:
            if a.requires_grad:
                ctx.book.add_factor(a, low, rows)
            ctx.book.add_factor(b, g, scaled)
        else:
            if a.requires_grad:
                grad_a = outer(low, rows).to(a.dtype)
            grad_b = outer(g, scaled).to(b.dtype)
        return gx, grad_a, grad_b, None, None


class _ExpertsWithFactors(torch.autograd.Function):
    """The same for rows sorted by expert: `W`, `A` and `B` have a leading expert axis."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        a: nn.Parameter,
        b: nn.Parameter,
        layer: LoraExperts,
        name: str,
        routing: Routing,
        scope: BatchScope,
    ) -> Tensor:
        down, up = filled(a.to(x.dtype), rows=True), filled(b.to(x.dtype), columns=True)
        h = grouped_rows(x, down.mT, routing.ends)
        y = layer.base_matmul(name, x, routing.ends)
        y.add_(grouped_rows(h, up.mT, routing.ends), alpha=layer.factor)
        ctx.save_for_backward(x, h)
        ctx.parameters, ctx.layer, ctx.name = (a, b), layer, name
        ctx.routing, ctx.book = routing, scope.book
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, h = ctx.saved_tensors
        (a, b), factor, routing = ctx.parameters, ctx.layer.factor, ctx.routing
        g = grads[0].contiguous()
        low = grouped_rows(g, filled(b.to(g.dtype), columns=True), routing.ends)
        low *= factor
        gx = grad_a = grad_b = None
        if ctx.needs_input_grad[0]:
            gx = ctx.layer.base_matmul_transposed(ctx.name, g, routing.ends)
            gx.add_(grouped_rows(low, filled(a.to(g.dtype), rows=True), routing.ends))
        low, scaled = narrowed(low, a.shape[1]), narrowed(h * factor, a.shape[1])
        if ctx.book is not None:
            unit, segments = routing.segments(ctx.book.unit_of_token, ctx.book.units)
            if a.requires_grad:
                ctx.book.add_expert_factor(a, low, x, unit, segments, routing.spans)
            ctx.book.add_expert_factor(b, g, scaled, unit, segments, routing.spans)
        else:
            if a.requires_grad:
                grad_a = grouped_outer(low, x, routing.ends).to(a.dtype)
            grad_b = grouped_outer(g, scaled, routing.ends).to(b.dtype)
        return gx, grad_a, grad_b, None, None, None, None


class _FrozenGrouped(torch.autograd.Function):
    """`x_e W_e` for rows sorted by expert and a frozen weight `[E, in, out]`; gradient with respect to x only."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
        ctx.weight, ctx.ends = weight, ends
        return grouped_rows(x, weight, ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grouped_rows(grads[0].contiguous(), ctx.weight.mT, ctx.ends), None, None


def frozen_grouped(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    """`x_e W_e^T` for rows sorted by expert and a frozen `W [E, out, in]`, inside autograd."""
    product: Tensor = _FrozenGrouped.apply(x, weight.detach().to(x.dtype).mT, ends)  # type: ignore[no-untyped-call]  # torch's
    return product


class _FrozenBase(nn.Module, LoraLayer):  # type: ignore[misc]  # PEFT ships no types
    """What both layers share: PEFT's book-keeping attributes and the scope."""

    base_layer: nn.Module
    lora_A: nn.ModuleDict  # noqa: N815  # PEFT's name
    lora_B: nn.ModuleDict  # noqa: N815
    scope: BatchScope
    factor: float

    def _begin(self, base_layer: nn.Module, adapter_name: str, r: int, lora_alpha: float, config: Any) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        if config.lora_dropout or config.use_dora or config.use_rslora or config.lora_bias:
            raise EngineError(
                "LoRA dropout, bias, DoRA and rsLoRA are not supported in private training", fix="leave them off"
            )
        if adapter_name != ADAPTER:
            raise EngineError(f"the adapter is called {adapter_name!r}", fix=f"call it {ADAPTER!r}")
        self._active_adapter = adapter_name
        self.scope, self.factor = BatchScope(), float(lora_alpha) / r
        peft: Any = self
        peft.r[adapter_name], peft.lora_alpha[adapter_name] = r, lora_alpha
        peft.scaling[adapter_name] = self.factor


class LoraLinear(_FrozenBase):
    """LoRA on `nn.Linear` or `QuantLinear`. PEFT's names: `lora_A.default.weight [r, in]`, `lora_B... [out, r]`."""

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 8, lora_alpha: float = 16, **_: Any
    ) -> None:
        self._begin(base_layer, adapter_name, r, lora_alpha, config)
        inputs, outputs = self._get_in_out_features(base_layer)
        self.lora_A = nn.ModuleDict({adapter_name: nn.Linear(inputs, r, bias=False)})
        self.lora_B = nn.ModuleDict({adapter_name: nn.Linear(r, outputs, bias=False)})

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int]:
        if not isinstance(module, nn.Linear | QuantLinear):
            raise EngineError(f"LoRA cannot adapt a {type(module).__name__}", fix="report this defect")
        return module.in_features, module.out_features

    def base_matmul(self, x: Tensor) -> Tensor:
        """`x W^T` of the frozen weight, outside autograd: `[M, in]` to `[M, out]`."""
        base: Any = self.base_layer
        y: Tensor = base.matmul(x) if isinstance(base, QuantLinear) else x @ base.weight.detach().to(x.dtype).mT
        return y

    def base_matmul_transposed(self, g: Tensor) -> Tensor:
        """`g W` of the frozen weight, outside autograd: `[M, out]` to `[M, in]`."""
        base: Any = self.base_layer
        if isinstance(base, QuantLinear):
            return base.matmul_transposed(g)
        gx: Tensor = g @ base.weight.detach().to(g.dtype)
        return gx

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        down: Any = self.lora_A[ADAPTER]
        up: Any = self.lora_B[ADAPTER]
        base: Any = self.base_layer
        scope = self.scope
        if scope.mode == "hooks":
            # Called as modules, the factors cannot be cast to a half-precision model's type: the rows go to theirs.
            examples = x.reshape(scope.records, -1, x.shape[-1]).to(down.weight.dtype)
            added = self.factor * up(down(examples)).view(*x.shape[:-1], -1)
            hooked: Tensor = base(x) + added.to(x.dtype)
            return hooked
        y: Tensor = _LinearWithFactors.apply(x, down.weight, up.weight, self, scope)  # type: ignore[no-untyped-call]  # torch's
        return y if base.bias is None else y + base.bias.to(y.dtype)


class ExpertFactor(nn.Module):
    """One LoRA factor of all experts, `weight [E, out, in]`: a leaf, so that hooks can see it."""

    def __init__(self, experts: int, out_features: int, in_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(experts, out_features, in_features))

    def forward(self, x: Tensor, ends: Tensor, record_of_row: Tensor, anchor: Tensor) -> Tensor:  # noqa: ARG002
        """Rows `[M, in]` sorted by expert to `[M, out]`.

        The last two are there for Opacus, which records all arguments: the record of each row, and `[B, 0]` that
        tells it the batch size.
        """
        return grouped_matmul(x, self.weight.mT, ends)


class _Experts(nn.Module):
    """What routed experts with and without LoRA share: fused experts of Hugging Face or `QuantExperts` underneath.

    No token is dropped but padding, and no expert sees which tokens share its batch.
    """

    base_layer: nn.Module
    scope: BatchScope
    num_experts: int

    def base_matmul(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """`x_e W_e^T` of `gate_up` `[E, 2I, H]` or `down` `[E, H, I]`, outside autograd, for rows sorted by expert."""
        base: Any = self.base_layer
        if isinstance(base, QuantExperts):
            return base.matmul(f"{name}_proj", x, ends)
        return grouped_rows(x, getattr(base, f"{name}_proj").detach().to(x.dtype).mT, ends)

    def base_matmul_transposed(self, name: str, g: Tensor, ends: Tensor) -> Tensor:
        """`g_e W_e` of the same weights."""
        base: Any = self.base_layer
        if isinstance(base, QuantExperts):
            return base.matmul_transposed(f"{name}_proj", g, ends)
        return grouped_rows(g, getattr(base, f"{name}_proj").detach().to(g.dtype), ends)

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`[T, H]` with the router's choice `[T, K]` and weights `[T, K]` to `[T, H]`; padding gets zeros."""
        base: Any = self.base_layer
        packed, seen = self.scope.packed, hidden_states.shape[0]
        if packed is not None and seen != packed.ids.shape[0]:
            raise EngineError(
                f"the experts saw {seen} tokens, not {packed.ids.shape[0]}: the model mixes examples",
                fix="this architecture cannot be trained privately",
            )
        rows = None if packed is None else packed.rows
        routing = Routing(top_k_index, self.num_experts, self.scope.kept, rows)
        gate, up = self._project("gate_up", routing.select(hidden_states), routing).chunk(2, dim=-1)
        out = self._project("down", base.act_fn(gate) * up, routing)
        return routing.weighted_sum(out, top_k_weights).to(hidden_states.dtype)

    def _frozen(self, name: str, x: Tensor, ends: Tensor) -> Tensor:
        """The frozen product inside autograd."""
        base: Any = self.base_layer
        if isinstance(base, QuantExperts):
            return base.project(f"{name}_proj", x, ends)
        return frozen_grouped(x, getattr(base, f"{name}_proj"), ends)

    def _project(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        return self._frozen(name, x, routing.ends)


class PlainExperts(_Experts):
    """Routed experts without LoRA. In anything but a packed micro-batch the layer underneath runs as it is."""

    def __init__(self, base_layer: nn.Module, scope: BatchScope) -> None:
        super().__init__()
        self.base_layer, self.scope = base_layer, scope
        self.num_experts = shape_of(base_layer)[0]

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As the layer underneath."""
        if self.scope.packed is None:
            stock: Tensor = self.base_layer(hidden_states, top_k_index, top_k_weights)
            return stock
        return super().forward(hidden_states, top_k_index, top_k_weights)


class LoraExperts(_Experts, _FrozenBase):
    """LoRA on fused routed experts: Hugging Face's float module or `QuantExperts`.

    Factors: `lora_A_gate_up [E, r, H]`, `lora_B_gate_up [E, 2I, r]`, `lora_A_down [E, r, I]`, `lora_B_down [E, H, r]`.
    """

    adapter_layer_names: tuple[str, ...] = ("lora_A_gate_up", "lora_B_gate_up", "lora_A_down", "lora_B_down")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 8, lora_alpha: float = 16, **_: Any
    ) -> None:
        self._begin(base_layer, adapter_name, r, lora_alpha, config)
        experts, hidden, inner = shape_of(base_layer)
        self.num_experts = experts
        for name, out, inputs in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
            setattr(self, f"lora_A_{name}", nn.ModuleDict({adapter_name: ExpertFactor(experts, r, inputs)}))
            setattr(self, f"lora_B_{name}", nn.ModuleDict({adapter_name: ExpertFactor(experts, out, r)}))

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:  # noqa: ARG002  # PEFT's signature
        return None, None

    def _project(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        a, b = getattr(self, f"lora_A_{name}")[ADAPTER], getattr(self, f"lora_B_{name}")[ADAPTER]
        scope = self.scope
        if scope.mode == "hooks":
            if scope.unit_anchor is None:
                raise EngineError("hooks need the micro-batch's anchor", fix="report this defect")
            record = routing.tokens // scope.tokens
            rest = (routing.ends, record, scope.unit_anchor)
            frozen = self._frozen(name, x, routing.ends)
            added: Tensor = self.factor * b(a(x.to(a.weight.dtype), *rest), *rest)
            return frozen + added.to(x.dtype)
        y: Tensor = _ExpertsWithFactors.apply(  # type: ignore[no-untyped-call]  # torch's
            x, a.weight, b.weight, self, name, routing, scope
        )
        return y


def shape_of(base: Any) -> tuple[int, int, int]:
    """Experts, hidden and inner width of fused experts; EngineError when their layout is another."""
    if isinstance(base, QuantExperts):
        return base.num_experts, base.hidden, base.intermediate
    _check_float_experts(base)
    experts, hidden, inner = base.down_proj.shape
    return experts, hidden, inner


def _check_float_experts(base: Any) -> None:
    """Refuse an expert module whose layout is not the fused, gated, bias-free one."""
    required = {"has_gate": True, "has_bias": False, "is_transposed": False, "is_concatenated": True}
    wrong = [name for name, value in required.items() if getattr(base, name, None) is not value]
    wrong += [name for name in ("gate_up_proj", "down_proj", "act_fn") if not hasattr(base, name)]
    if wrong or getattr(base, "has_post_expert_norm", False):
        raise EngineError(
            f"the experts of type {type(base).__name__} have another layout ({', '.join(wrong) or 'a norm'})",
            fix="private training supports fused, gated experts without bias",
        )
