"""Private steps on a small model with known keys, alone or as one of several ranks under torchrun.

`torchrun --nproc-per-node 2 rank_steps.py DIRECTORY`: each rank leaves files
`CASE-sums-RANK.safetensors` and `CASE-parameters-RANK.safetensors`.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch import distributed as dist

from fl_client.dp.engine import DPEngine
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.optimizer import GridDPOptimizer
from fl_client.dp.shard import Shard
from fl_shared.privacy.mechanism import Mechanism
from helpers.random_models import adapted_small, units_of_records

# What stands for a case: the units' records' lengths, and the sampling probability.
CASES = {
    "many": ([[5, 3], [9], [1], [2, 6, 4, 1], [7], [4], [3, 3], [8], [2]], 0.6),
    "fewer-units-than-ranks": ([[5]], 0.5),
    "often-empty": ([[5], [2, 3]], 0.1),
}
STEPS = 4


def released(case: str, shard: Shard | None = None) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Each step's noisy sum (of the process that adds the noise), and the parameters after the last step."""
    sizes, probability = CASES[case]
    adapted = adapted_small("qwen2_moe", quantised=True)
    first = shard is None or shard.first
    engine = DPEngine(
        adapted,
        units_of_records(sizes),
        Mechanism(noise_multiplier=1.0, sampling_probability=probability, steps=STEPS, clipping_norm=1.0),
        learning_rate=1e-3, head_learning_rate=1e-3, momentum=0.0, expected_batch=1.0, shard=shard,
        sampling=SecureStream(bytes(32)) if first else None,
        noise=SecureStream(bytes([1] * 32)) if first else None,
    )  # fmt: skip
    sums: dict[str, Tensor] = {}
    account = engine.optimizer.step_hook

    def keep(optimizer: GridDPOptimizer) -> None:
        sums[str(len(sums))] = torch.cat([p.grad.reshape(-1) for p in optimizer.params])
        account(optimizer)

    engine.optimizer.attach_step_hook(keep)
    engine.run()
    assert engine.executed().steps == STEPS
    assert len(sums) == (STEPS if first else 0)
    return sums, {name: p.detach().clone() for name, p in adapted.trainable.items()}


def main() -> None:
    """Run every case as one rank."""
    out = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    shard = Shard(torch.device("cpu"))
    for case in CASES:
        sums, parameters = released(case, shard)
        save_file(sums, out / f"{case}-sums-{shard.rank}.safetensors")
        save_file(parameters, out / f"{case}-parameters-{shard.rank}.safetensors")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
