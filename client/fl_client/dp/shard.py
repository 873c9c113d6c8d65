"""One logical step over several processes of a site: units are dealt out, the noise is added once.

Every process holds the whole model. The first draws the sample and tells the others; each clips its own share of the
units; the clipped sums meet in the first, which rounds the whole sum to the grid, adds the noise and steps; all take
over its parameters. So sampler, noise, accountant and optimizer exist once, and what is released is what one process
would have released, up to the order in which floats are added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch import distributed as dist

from fl_client.dp.mechanism.sampling import PoissonSampler


class Shard:
    """This process's place in the default group of `torch.distributed`, which must be initialised.

    Every method is a collective: all processes call it in the same order, or wait until the group's timeout.

    Args:
        device: where tensors travel; a CUDA device with NCCL, the CPU with gloo.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size, self.device = dist.get_rank(), dist.get_world_size(), device

    @property
    def first(self) -> bool:
        """Whether this process draws, adds noise and counts."""
        return self.rank == 0

    def samples(self, sampler: PoissonSampler) -> Iterator[list[int]]:
        """This process's share of each step's sample, drawn by the first process alone; may be empty."""
        for _ in range(len(sampler)):
            chosen = torch.zeros(sampler.units, dtype=torch.uint8)
            if self.first:
                chosen[torch.from_numpy(sampler.draw())] = 1
            chosen = chosen.to(self.device)
            dist.broadcast(chosen, 0)
            units: list[int] = torch.nonzero(chosen).squeeze(1).tolist()
            yield units[self.rank :: self.size]

    def gather(self, parameters: list[nn.Parameter]) -> None:
        """Clipped sums of all processes into the first one's `summed_grad`, added in float64."""
        summed: list[Any] = list(parameters)  # Opacus keeps the sum as an attribute of the parameter
        parts = [torch.zeros_like(p) if p.summed_grad is None else p.summed_grad for p in summed]
        flat = torch.cat([part.detach().reshape(-1).double() for part in parts]).to(self.device)
        dist.reduce(flat, 0)
        if self.first:
            for p, part in zip(summed, _split(flat, parameters), strict=True):
                p.summed_grad = part.to(p.device)

    def share(self, parameters: list[nn.Parameter]) -> None:
        """Take over the first process's parameters, after its step."""
        flat = torch.cat([p.detach().reshape(-1) for p in parameters]).to(self.device)
        dist.broadcast(flat, 0)
        if not self.first:
            with torch.no_grad():
                for p, part in zip(parameters, _split(flat, parameters), strict=True):
                    p.copy_(part)


def _split(flat: Tensor, parameters: list[nn.Parameter]) -> Iterator[Tensor]:
    at = 0
    for p in parameters:
        yield flat[at : at + p.numel()].view_as(p)
        at += p.numel()
