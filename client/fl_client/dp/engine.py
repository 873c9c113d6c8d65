"""DP-SGD over privacy units (Abadi et al. 2016, arXiv 1607.00133, Algorithm 1) on an adapted model.

One logical step: sample units, run them in micro-batches, clip every unit over all tensors together, add the noise
once, step. The step that the accountant hears of is the step that was taken: it is told by the optimizer's hook.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from opacus import GradSampleModule
from opacus.accountants import RDPAccountant
from opacus.grad_sample import GradSampleModuleFastGradientClipping
from torch import Tensor

from fl_client.dp import grad_samplers
from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.coverage import ExpertCoverage
from fl_client.dp.kernels import independent_rows, use_exact_products
from fl_client.dp.layers.book import GradientBook
from fl_client.dp.mechanism.noise import MAX_DRAWS
from fl_client.dp.mechanism.sampling import PoissonSampler
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.objective import losses_of
from fl_client.dp.optimizer import GridDPOptimizer
from fl_client.dp.records.packing import Packed, cut, pack
from fl_client.dp.records.records import MAX_UNITS, MicroBatch, Records, pack_units
from fl_client.dp.rounding import slack
from fl_client.dp.shard import Shard
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import LEAST_CLIPPING_NORM, Mechanism

log = logging.getLogger("fl_client.dp")

EngineName = Literal["book", "hooks", "ghost"]
_MEMORY_RAN_OUT = (
    "DefaultCPUAllocator: can't allocate memory", "CUDA error: out of memory", "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED", "Triton Error [CUDA]: out of memory",
)  # fmt: skip


class DPEngine:
    """Private training of one adapted model on one data set.

    Args:
        adapted: the model and what may move in it.
        records: private records, by unit.
        mechanism: what is charged; its q, sigma, C and steps are what is executed.
        learning_rate, head_learning_rate, momentum: of SGD on the noisy gradient.
        expected_batch: constant that sums are divided by; q times the number of units when left out. The number of
            units is public by decision (docs/decisions/0023), that of a part of them is not.
        most_units: public bound on the number of units; their number when left out, which then counts as public. The
            noise's grid follows from it, and whoever gets an update can read the grid off exactly.
        engine: `book`; `hooks` for Opacus' own `grad_sample`, `ghost` for its ghost clipping with a second backward
            pass (one record per unit only). The last two are slow and serve as oracles.
        frozen: trainable tensors that stay as they are (aggregation `ffa` freezes every factor A).
        max_units: units in a micro-batch.
        shard: this process's share, when several processes of the site train together.
        sampling, noise: random streams; only tests pass them.

    Raises:
        EngineError: C is too small for float32, the expected batch is not positive, there are more units than
            `most_units`, or more draws of noise in the round than its tables are good for.
    """

    def __init__(
        self,
        adapted: AdaptedModel,
        records: Records,
        mechanism: Mechanism,
        *,
        learning_rate: float,
        head_learning_rate: float,
        momentum: float,
        expected_batch: float | None = None,
        most_units: int | None = None,
        engine: EngineName = "book",
        frozen: frozenset[str] = frozenset(),
        max_units: int = MAX_UNITS,
        shard: Shard | None = None,
        sampling: SecureStream | None = None,
        noise: SecureStream | None = None,
    ) -> None:
        if mechanism.clipping_norm < LEAST_CLIPPING_NORM:
            raise EngineError(
                f"clipping norm {mechanism.clipping_norm:g} < {LEAST_CLIPPING_NORM:g}", fix="order a larger one"
            )
        if expected_batch is None:
            expected_batch = mechanism.sampling_probability * records.units
        if not expected_batch > 0:
            raise EngineError(f"expected batch {expected_batch:g}", fix="give a positive constant")
        most_units = records.units if most_units is None else most_units
        if records.units > most_units:
            raise EngineError("there are more units than their public bound", fix="raise [data] expected_units")
        use_exact_products()
        self.adapted, self.records, self.mechanism, self.name = adapted, records, mechanism, engine
        self.max_units, self.shard = max_units, shard
        self.device = next(iter(adapted.trainable.values())).device
        for name, parameter in adapted.trainable.items():
            parameter.requires_grad_(name not in frozen)
        trained = {name: p for name, p in adapted.trainable.items() if name not in frozen}
        head = [p for name, p in trained.items() if adapted.groups[name] == "head"]
        factors = [p for name, p in trained.items() if adapted.groups[name] != "head"]
        groups = [{"params": factors, "lr": learning_rate}, {"params": head, "lr": head_learning_rate}]
        self.optimizer = GridDPOptimizer(
            torch.optim.SGD([group for group in groups if group["params"]], momentum=momentum),
            noise_multiplier=mechanism.noise_multiplier,
            max_grad_norm=mechanism.clipping_norm,
            expected_batch_size=expected_batch,
            stream=noise or SecureStream(),
            slack=slack(units=most_units, rows=self._most_rows(), ranks=1 if shard is None else shard.size),
        )
        draws = mechanism.steps * self.optimizer.dimensions * self.optimizer.grid.tables
        if draws > MAX_DRAWS:
            raise EngineError(
                f"{mechanism.steps} steps over {self.optimizer.dimensions} coordinates need {draws:.1e} draws of noise",
                fix=f"order fewer steps a round or a lower LoRA rank: at most {MAX_DRAWS:.1e}",
            )
        self.sampler = PoissonSampler(
            records.units, mechanism.sampling_probability, mechanism.steps, sampling or SecureStream()
        )
        self.accountant = RDPAccountant()
        self.optimizer.attach_step_hook(self.accountant.get_optimizer_hook_fn(self.sampler.probability))
        self.coverage = ExpertCoverage(adapted)
        self._hooked = None if engine == "book" else self._wrap()

    def _most_rows(self) -> int:
        """Rows of the experts' products in the largest micro-batch."""
        config: Any = self.adapted.module.backbone.config
        return self.adapted.heights[-1] * int(config.num_experts_per_tok)

    def _wrap(self) -> GradSampleModule:
        grad_samplers.register()
        for module in self.adapted.module.modules():  # Opacus' hooks see modules in training mode alone
            module.training = any(p.requires_grad for p in module.parameters(recurse=False))
        if self.name == "hooks":
            return GradSampleModule(self.adapted.module, loss_reduction="sum", strict=False)
        if any(len(records) > 1 for records in self.records.of_unit):
            raise EngineError("ghost clipping cannot clip units of several records", fix="use engine 'book'")
        return GradSampleModuleFastGradientClipping(
            self.adapted.module, loss_reduction="sum", strict=False, max_grad_norm=self.mechanism.clipping_norm
        )

    def close(self) -> None:
        """Take Opacus' hooks off; put the layers back into plain mode."""
        self.adapted.module.eval()
        scope = self.adapted.scope
        scope.mode, scope.book, scope.unit_anchor = "plain", None, None
        if self._hooked is not None:
            self._hooked.to_standard_module()
            self._hooked = None

    def run(self, after_step: Callable[[int], None] | None = None) -> None:
        """All steps of the mechanism. `after_step` hears the number of steps taken.

        The base stays in eval mode, in which the layers were checked: no dropout, no router jitter.
        """
        samples = self.sampler if self.shard is None else self.shard.samples(self.sampler)
        try:
            for number, units in enumerate(samples, start=1):
                self.step(units)
                if after_step is not None:
                    after_step(number)
        finally:
            self.close()

    def executed(self) -> Mechanism:
        """The mechanism as the accountant heard of it; EngineError when that is not what was ordered."""
        history = self.accountant.history
        ordered = self.mechanism
        if self.shard is not None and not self.shard.first:
            return ordered  # the first process takes the steps, and counts them
        expected = [(ordered.noise_multiplier, ordered.sampling_probability, ordered.steps)] if ordered.steps else []
        if [tuple(entry) for entry in history] != expected:
            raise EngineError(
                f"the accountant counted {history}, not {ordered.steps} steps of the ordered mechanism",
                fix="report this defect; the reservation stays charged",
            )
        return ordered

    def report(self) -> dict[str, Any]:
        """Figures for the site's own eyes; the experts' coverage is as private as the data."""
        grid = self.optimizer.grid
        return {
            "engine": self.name,
            "dimensions": self.optimizer.dimensions,
            "grid_step": grid.step,
            "sensitivity": grid.sensitivity,
            "noise_standard_deviation": grid.step * grid.width,
            "expected_batch": self.optimizer.expected_batch_size,
            "units_left_out": self.optimizer.left_out,
            **self.coverage.report(),
        }

    def step(self, units: Sequence[int]) -> None:
        """One logical step on these units, or this process's share; an empty sample is noise alone, and counts."""
        self.optimizer.zero_grad(set_to_none=True)
        self.accumulate(units)
        if self.shard is not None:
            self.shard.gather(self.optimizer.params)
        if self.shard is None or self.shard.first:
            self.coverage.note()
            self.optimizer.step()
        if self.shard is not None:
            self.shard.share(self.optimizer.params)
        self.optimizer.zero_grad(set_to_none=True)

    def accumulate(self, units: Sequence[int]) -> None:
        """Add the clipped gradients of these units, micro-batch by micro-batch.

        Through Opacus' hooks every unit is a micro-batch of its own: their kernels know no packing, and no unit may
        change how another is computed.

        Raises:
            EngineError: a micro-batch of one unit does not fit into memory.
        """
        with independent_rows(self.device, precision_of(self.adapted)):
            if self._hooked is not None:
                for unit in units:
                    self._forward_backward_hooked(pack_units(self.records, [unit], self.device))
                    self.optimizer.clip_and_accumulate()
                return
            waiting = cut(self.records, units, max_units=self.max_units, heights=self.adapted.heights)[::-1]
            while waiting:
                chosen = waiting.pop()
                if len(chosen) > self.max_units:  # memory ran out since it was cut
                    waiting += [chosen[self.max_units :], chosen[: self.max_units]]
                elif not self._fits(chosen):
                    if len(chosen) == 1:
                        raise EngineError(
                            "a micro-batch of one privacy unit does not fit into memory",
                            fix="lower [task] max_tokens, max_records_per_unit or the LoRA rank",
                        )
                    self.max_units = (len(chosen) + 1) // 2
                    log.warning("out of memory: micro-batches of at most %d units from here on", self.max_units)
                    waiting.append(chosen)

    def _fits(self, units: Sequence[int]) -> bool:
        """Run one micro-batch; False, with nothing added, when memory ran out."""
        try:
            self.forward_backward(pack(self.records, units, self.device, heights=self.adapted.heights))
            self.optimizer.clip_and_accumulate()
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            self.optimizer.forget()
        else:
            return True
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return False

    def forward_backward(self, batch: Packed) -> None:
        """One pass; what every unit contributed then waits in the optimizer."""
        self.optimizer.take_book(book_of(self.adapted, batch))

    def _forward_backward_hooked(self, batch: MicroBatch) -> None:
        scope = self.adapted.scope
        scope.mode, scope.records, scope.tokens = "hooks", batch.ids.shape[0], batch.ids.shape[1]
        scope.unit_anchor = batch.ids.new_empty(batch.ids.shape[0], 0)
        hooked: Any = self._hooked
        losses = losses_of(self.adapted.objective, hooked(batch.ids, batch.mask), batch.targets)
        if self.name == "ghost":
            self._second_pass(losses)
        else:
            losses.sum().backward()
            self.optimizer.take_units(batch.unit_of_record, batch.units)

    def _second_pass(self, losses: Tensor) -> None:
        """Ghost clipping (Li et al. 2022, arXiv 2110.05679): norms from one pass, the weighted sum from another."""
        hooked: Any = self._hooked
        optimizer = self.optimizer
        losses.sum().backward(retain_graph=True)
        factors = optimizer.clip_factors(hooked.get_norm_sample().double()).to(losses.dtype)
        for parameter in optimizer.params:
            parameter.grad = None
        if not bool(factors.any()):  # left out; its infinities are not multiplied
            optimizer.take_sums([])
            return
        hooked.disable_hooks()
        (losses * factors).sum().backward()
        hooked.enable_hooks()
        optimizer.take_sums([(parameter, parameter.grad.float()) for parameter in optimizer.params])
        for parameter in optimizer.params:
            parameter.grad = None


def precision_of(adapted: AdaptedModel) -> torch.dtype:
    """The base model's floating type: activations and gradients have it, too."""
    return next(p.dtype for p in adapted.module.backbone.parameters() if p.is_floating_point())


@contextlib.contextmanager
def memory_errors_typed() -> Iterator[None]:
    """Turn memory that runs out, however a library says it, into an EngineError."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        raise EngineError("memory ran out", fix="lower the LoRA rank, or use a larger machine") from error


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch or Python says that memory ran out; most libraries beneath have no exception type for it."""
    known = isinstance(error, torch.OutOfMemoryError | MemoryError)
    return known or (isinstance(error, RuntimeError) and any(text in str(error) for text in _MEMORY_RAN_OUT))


def book_of(adapted: AdaptedModel, batch: Packed) -> GradientBook:
    """The book of one micro-batch, after its forward and backward pass."""
    scope = adapted.scope
    book = GradientBook(batch)
    scope.mode, scope.book = "book", book
    try:
        losses_of(adapted.objective, adapted.module.packed(batch), batch.targets).sum().backward()
    finally:
        scope.mode, scope.book = "plain", None
    return book
