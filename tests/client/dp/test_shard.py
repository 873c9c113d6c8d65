"""Two processes under torchrun release what one process releases."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fl_client.dp.mechanism.secure_random import SecureStream
from helpers import rank_steps

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def by_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two real processes over gloo left behind, for every case."""
    out = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2",
         rank_steps.__file__, str(out)],
        env={**os.environ, "PYTHONPATH": str(ROOT / "tests"), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.parametrize("case", rank_steps.CASES)
def test_two_processes_release_what_one_does(by_two: Path, case: str) -> None:
    """Sample, clipped sum and noise of every step are one process's: float32's summation order is all that differs."""
    wanted, _ = rank_steps.released(case)
    found = load_file(by_two / f"{case}-sums-0.safetensors")
    assert len(found) == rank_steps.STEPS
    for step, value in wanted.items():
        torch.testing.assert_close(found[step], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", rank_steps.CASES)
def test_every_process_holds_the_same_parameters(by_two: Path, case: str) -> None:
    """After each step the second process has exactly the first one's parameters."""
    first, second = (load_file(by_two / f"{case}-parameters-{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_comparison_would_notice_noise_added_twice(by_two: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: with another noise key the same steps differ by far more than the tolerance."""
    monkeypatch.setattr(rank_steps, "SecureStream", lambda key: SecureStream(bytes([9] * 32) if any(key) else key))
    other, _ = rank_steps.released("many")
    found = load_file(by_two / "many-sums-0.safetensors")
    assert float((found["0"] - other["0"]).abs().max()) > 1.0
