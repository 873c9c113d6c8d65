"""Checks that stop a round before anything leaves: on the layers at start-up, and on what moved.

Stock parts fail in silence on these models: targets rewritten, routers adapted, tokens clipped instead of examples.
So nothing is taken on trust. `check_layers` runs public random tokens through the engine's own path and through a
batch-size-1 loop; `StepCheck` holds what moved against what may move.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.engine import DPEngine, EngineName, book_of, precision_of
from fl_client.dp.initial import initial_tensors
from fl_client.dp.invariance import check_invariance
from fl_client.dp.objective import losses_of
from fl_client.dp.records.packing import heights_for, pack
from fl_client.dp.records.records import Records, pack_units
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import Mechanism

PROBE_LENGTHS = (5, 1, 9, 3)
PROBE_UNITS = (0, 0, 1, 2)
PROBE_SEED = 7
TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 8e-2, torch.float16: 2e-2}


def unit_gradients_by_loop(adapted: AdaptedModel, records: Records, units: int) -> Iterator[dict[str, Tensor]]:
    """The oracle: each unit's gradient from its records one at a time, batch size 1, plain autograd."""
    device = next(iter(adapted.trainable.values())).device
    for unit in range(units):
        adapted.module.zero_grad(set_to_none=True)
        for record in records.of_unit[unit]:
            alone = Records(records.ids, records.targets, (np.array([record]),), 0)
            batch = pack_units(alone, [0], device)
            losses_of(adapted.objective, adapted.module(batch.ids, batch.mask), batch.targets).sum().backward()
        yield {
            name: (torch.zeros_like(p) if p.grad is None else p.grad.detach().clone())
            for name, p in adapted.trainable.items()
            if p.requires_grad
        }
    adapted.module.zero_grad(set_to_none=True)


def check_layers(adapted: AdaptedModel, *, vocabulary: int, rows: int = 0, engine: EngineName = "book") -> float:
    """Hold the engine's per-unit gradients against the batch-size-1 loop on public random tokens.

    The adapter that was sent has no say: weights start from public ones, shaken, since a zero factor B would hide
    factor A, and are put back afterwards. Runs once for an adapted model.

    Args:
        rows: tokens that all records of one unit may have together; shapes up to these are tried.
        engine: with `hooks` every unit is computed alone, and no shapes have to be tried.

    Returns:
        The largest relative error over units.

    Raises:
        EngineError: a parameter would move that may not, a trainable one is not reached, or the gradients differ.
    """
    if adapted.probed == engine and adapted.probe_error is not None and rows <= adapted.heights[-1]:
        return adapted.probe_error
    _nothing_else_moves(adapted)
    chance = np.random.Generator(np.random.PCG64(PROBE_SEED))
    ids = tuple(tuple(int(i) for i in chance.integers(0, vocabulary, size=n)) for n in PROBE_LENGTHS)
    targets = adapted.objective.random_targets(len(ids), chance)
    owners = np.array(PROBE_UNITS)
    records = Records(ids, targets, tuple(np.flatnonzero(owners == u) for u in range(owners.max() + 1)), 0)
    before = {name: p.detach().clone() for name, p in adapted.trainable.items()}
    start = initial_tensors(adapted, PROBE_SEED)
    try:
        with torch.no_grad():
            for name, p in adapted.trainable.items():
                noise = chance.normal(0, 0.05, size=tuple(p.shape)).astype(np.float32)
                p.copy_(torch.from_numpy(start[name] + noise))
        error = _probe(adapted, records, engine)
        if engine == "book":
            check_invariance(adapted, vocabulary=vocabulary, seed=PROBE_SEED, rows=rows)
        else:
            adapted.heights = heights_for(rows)
    finally:
        with torch.no_grad():
            for name, p in adapted.trainable.items():
                p.copy_(before[name])
    adapted.probe_error, adapted.probed = error, engine
    return error


def _nothing_else_moves(adapted: AdaptedModel) -> None:
    listed = {id(p) for p in adapted.trainable.values()}
    if len(listed) != len(adapted.trainable):
        raise EngineError("two trainable tensors share memory", fix="leave the tied layer out of the LoRA targets")
    odd = [n for n, p in adapted.module.named_parameters() if p.requires_grad and id(p) not in listed]
    if odd:
        raise EngineError(f"{odd[0]} is trainable without being planned ({len(odd)} in all)", fix="freeze the base")


_Gradients = Iterable[tuple[dict[str, Tensor], float]]


def _by_hooks(adapted: AdaptedModel, records: Records) -> _Gradients:
    """Each unit's gradient and its norm as engine `hooks` adds them; all of them, for the hooks must come off again."""
    frozen = frozenset(name for name, p in adapted.trainable.items() if not p.requires_grad)
    engine = DPEngine(
        adapted, records, Mechanism(1.0, 1.0, 1, 1e12),
        learning_rate=0.0, head_learning_rate=0.0, momentum=0.0, engine="hooks", frozen=frozen,
    )  # fmt: skip
    trained = {name: p for name, p in adapted.trainable.items() if name not in frozen}
    gradients = []
    try:
        for unit in range(records.units):
            engine.optimizer.zero_grad(set_to_none=True)
            engine.accumulate([unit])
            parameters: dict[str, Any] = dict(trained)  # Opacus keeps the sum as an attribute of the parameter
            sums = {name: p.summed_grad.detach().clone() for name, p in parameters.items()}
            gradients.append((sums, math.sqrt(sum(float(value.square().sum()) for value in sums.values()))))
    finally:
        engine.optimizer.zero_grad(set_to_none=True)
        engine.close()
    return gradients


def _by_book(adapted: AdaptedModel, records: Records) -> _Gradients:
    """The same from the book of one packed micro-batch; EngineError when it does not reach each trainable tensor."""
    device = next(iter(adapted.trainable.values())).device
    names = {id(p): name for name, p in adapted.trainable.items()}
    book = book_of(adapted, pack(records, list(range(records.units)), device, heights=adapted.heights))
    reached = [names.get(id(p), "?") for p in book.parameters]
    trained = {name for name, p in adapted.trainable.items() if p.requires_grad}
    if sorted(reached) != sorted(trained):
        missing = sorted(trained - set(reached)) or sorted(n for n in set(reached) if reached.count(n) > 1)
        raise EngineError(
            f"the backward pass does not reach the plan: {missing[0] if missing else 'unplanned tensors'}",
            fix="this architecture needs its own file under fl_client/model/architectures",
        )
    for unit, norm in enumerate(book.norms().tolist()):
        weights = torch.zeros(records.units, device=device)
        weights[unit] = 1.0
        yield {names[id(p)]: value.detach() for p, value in book.weighted_sums(weights)}, norm


def _probe(adapted: AdaptedModel, records: Records, engine: EngineName) -> float:
    dtype = precision_of(adapted)
    worst = 0.0
    gradients = (_by_book if engine == "book" else _by_hooks)(adapted, records)
    truths = unit_gradients_by_loop(adapted, records, records.units)
    for (gradient, norm), truth in zip(gradients, truths, strict=True):
        size = math.sqrt(sum(float(value.double().square().sum()) for value in truth.values()))
        apart = math.sqrt(sum(float((gradient[n] - value).double().square().sum()) for n, value in truth.items()))
        errors = (apart, abs(norm - size))
        sound = size > 0 and all(math.isfinite(error) for error in errors)
        worst = max(worst, max(errors) / size) if sound else math.inf
    if not worst <= TOLERANCE[dtype]:
        raise EngineError(
            f"per-unit gradients of this {adapted.architecture.model_type} model are off by {worst:.1e}",
            fix="the architecture mixes examples or has an unknown layer"
            + ('; a site may try [model] engine = "hooks"' if engine == "book" else ""),
        )
    return worst


class StepCheck:
    """What moved must be what may move.

    That every tensor that is to be trained is reached is checked where the sum is made (`GridDPOptimizer`). Whether
    it also moves depends on rates and noise, and is no fault.
    """

    def __init__(self, adapted: AdaptedModel, frozen: frozenset[str]) -> None:
        self._adapted = adapted
        self._still = {name: p.detach().clone() for name, p in adapted.trainable.items() if name in frozen}
        self._others = {
            name: (id(t), t._version, t.data_ptr()) for name, t in _fixed(adapted.module, adapted.trainable).items()
        }

    def after(self, number: int) -> None:
        """After the first step look at the trainable tensors that the run freezes; after every step, whether any other
        was written to."""
        for name, t in _fixed(self._adapted.module, self._adapted.trainable).items():
            if self._others.get(name) != (id(t), t._version, t.data_ptr()):
                raise EngineError(f"{name} is frozen and was written to", fix="report this defect")
        if number == 1:
            for name, before in self._still.items():
                if not torch.equal(self._adapted.trainable[name].detach(), before):
                    raise EngineError(f"{name} moved although frozen", fix="report this defect; nothing is released")


def _fixed(model: nn.Module, trainable: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    listed = {id(p) for p in trainable.values()}
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: t for name, t in named if id(t) not in listed}
