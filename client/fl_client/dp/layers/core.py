"""Fed-SB: between frozen, publicly seeded factors only an r x r core is trained: `y = W x + scaling * B (R (A x))`.

Singhal et al. 2025 (arXiv 2502.15436), after LoRA-SB (arXiv 2411.19557). The mean of the sites' cores is exactly the
mean of their models, `mean(B R_i A) = B mean(R_i) A`, and a private step adds noise to `r * r` numbers for each adapted
matrix instead of `r * (in + out)`. The papers take A and B from a gradient on training data, which would have to be
paid for; here they are random and public, with rows and columns of about unit length.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fl_client.dp.layers.book import grouped_outer, outer
from fl_client.dp.layers.lora import ADAPTER, ExpertFactor, LoraExperts, LoraLinear, filled, frozen_grouped, narrowed
from fl_client.dp.layers.routing import Routing
from fl_client.dp.layers.scope import BatchScope
from fl_client.model.quantised.matmul import grouped_rows
from fl_shared.errors import EngineError


def _square(core: Tensor, dtype: torch.dtype) -> Tensor:
    """Cores `[..., r, r]` filled up on both sides, as the rows that they meet are."""
    return filled(core.to(dtype), rows=True, columns=True)


class _Core(torch.autograd.Function):
    """`h R^T` for rows `[M, r]`; the core's gradient goes to the book when there is one."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, core: nn.Parameter, scope: BatchScope) -> Tensor:
        ctx.save_for_backward(h)
        ctx.core, ctx.book = core, scope.book
        return h @ _square(core, h.dtype).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h,), core, g = ctx.saved_tensors, ctx.core, grads[0].contiguous()
        gh = g @ _square(core, g.dtype) if ctx.needs_input_grad[0] else None
        if ctx.book is None:
            rank = core.shape[0]
            return gh, outer(narrowed(g, rank), narrowed(h, rank)).to(core.dtype), None
        ctx.book.add_factor(core, g, h)
        return gh, None, None


class _ExpertCores(torch.autograd.Function):
    """The same for rows sorted by expert, with one core `[E, r, r]` for each."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, cores: nn.Parameter, routing: Routing, scope: BatchScope) -> Tensor:
        ctx.save_for_backward(h)
        ctx.cores, ctx.routing, ctx.book = cores, routing, scope.book
        return grouped_rows(h, _square(cores, h.dtype).mT, routing.ends)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (h,), cores, routing, g = ctx.saved_tensors, ctx.cores, ctx.routing, grads[0].contiguous()
        gh = grouped_rows(g, _square(cores, g.dtype), routing.ends) if ctx.needs_input_grad[0] else None
        g, h = narrowed(g, cores.shape[1]), narrowed(h, cores.shape[1])
        if ctx.book is None:
            return gh, grouped_outer(g, h, routing.ends).to(cores.dtype), None, None
        unit, segments = routing.segments(ctx.book.unit_of_token, ctx.book.units)
        ctx.book.add_expert_factor(cores, g, h, unit, segments, routing.spans)
        return gh, None, None, None


class CoreLinear(LoraLinear):
    """`LoraLinear` with a core `lora_R.default.weight [r, r]` between its frozen factors."""

    adapter_layer_names = ("lora_A", "lora_B", "lora_R")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 8, lora_alpha: float = 16, **rest: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **rest)
        self.lora_R = nn.ModuleDict({adapter_name: nn.Linear(r, r, bias=False)})

    def forward(self, x: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        down: Any = self.lora_A[ADAPTER]
        core: Any = self.lora_R[ADAPTER]
        up: Any = self.lora_B[ADAPTER]
        scope = self.scope
        if scope.mode == "hooks":
            examples = x.reshape(scope.records, -1, x.shape[-1]).to(down.weight.dtype)
            added = up(core(down(examples))).to(x.dtype)
        else:
            h = F.linear(x.reshape(-1, x.shape[-1]), filled(down.weight.to(x.dtype), rows=True))
            mixed: Tensor = _Core.apply(h, core.weight, scope)  # type: ignore[no-untyped-call]  # torch's
            added = F.linear(mixed, filled(up.weight.to(x.dtype), columns=True))
        y: Tensor = self.base_layer(x)
        return torch.add(y, added.view(y.shape), alpha=self.factor)


class CoreExperts(LoraExperts):
    """`LoraExperts` with cores `lora_R_gate_up` and `lora_R_down`, each `[E, r, r]`, between its frozen factors."""

    adapter_layer_names: tuple[str, ...] = (*LoraExperts.adapter_layer_names, "lora_R_gate_up", "lora_R_down")

    def __init__(
        self, base_layer: nn.Module, adapter_name: str, config: Any, r: int = 8, lora_alpha: float = 16, **rest: Any
    ) -> None:
        super().__init__(base_layer, adapter_name, config, r, lora_alpha, **rest)
        for name in ("gate_up", "down"):
            setattr(self, f"lora_R_{name}", nn.ModuleDict({adapter_name: ExpertFactor(self.num_experts, r, r)}))

    def _project(self, name: str, x: Tensor, routing: Routing) -> Tensor:
        a, core, b = (getattr(self, f"lora_{factor}_{name}")[ADAPTER] for factor in "ARB")
        scope, ends = self.scope, routing.ends
        frozen = self._frozen(name, x, ends)
        if scope.mode == "hooks":
            if scope.unit_anchor is None:
                raise EngineError("hooks need the micro-batch's anchor", fix="report this defect")
            rest = (ends, routing.tokens // scope.tokens, scope.unit_anchor)
            added: Tensor = b(core(a(x.to(a.weight.dtype), *rest), *rest), *rest).to(x.dtype)
            return torch.add(frozen, added, alpha=self.factor)
        h = frozen_grouped(x, filled(a.weight, rows=True), ends)
        mixed: Tensor = _ExpertCores.apply(h, core.weight, routing, scope)  # type: ignore[no-untyped-call]  # torch's
        added = frozen_grouped(mixed, filled(b.weight, columns=True), ends)
        return torch.add(frozen, added, alpha=self.factor)
