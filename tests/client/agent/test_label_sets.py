"""The coordinator chooses a run's labels: what an update looks like must not tell how many units have one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from fl_client.dp.mechanism.noise import choose_grid
from fl_client.dp.records.packing import FULL
from fl_client.dp.rounding import slack
from fl_client.model.layout import directory_digest
from fl_client.model.load import TINY
from fl_shared.adapters.safetensors import unpack
from fl_shared.documents.spec import RunSpec
from helpers.agents import RealSite, spec
from helpers.gateway import Gateway

PATIENTS = 60
TOP_K = 2  # experts of a token in the packaged base
RATE, SAMPLED = 0.1, 0.05 * PATIENTS


def off_the_grid(moved: NDArray[np.float32], *, dimensions: int, units: int) -> int:
    """How many coordinates of one step from zero lie on no point of the noise's grid for so many units.

    This is what a coordinator can compute: spec, base and rate are known to it, and the grid's step follows from the
    number of units for which rounding is paid, to 1e-9 for each.
    """
    paid = slack(units=units, rows=FULL * TOP_K)
    grid = choose_grid(clipping_norm=1.0, noise_multiplier=1.0, dimensions=dimensions, slack=paid)
    nearest = np.rint(-moved.astype(np.float64) * SAMPLED / RATE / grid.step)
    found = np.zeros(len(moved), dtype=bool)
    for beside in (-2, -1, 0, 1, 2):
        gradient = torch.from_numpy(((nearest + beside) * grid.step).astype(np.float32))
        gradient /= SAMPLED
        found |= torch.zeros(len(moved)).add_(gradient, alpha=-RATE).numpy() == moved
    return int((~found).sum())


def test_the_noise_does_not_tell_how_many_units_have_the_runs_labels(tmp_path: Path, gateway: Gateway) -> None:
    """All records, half of them, none: a real agent answers each with noise of one deviation, on one and the same
    grid, that of the number of all units."""
    site = RealSite(tmp_path / "home", gateway, model={"directory": "tiny"})
    made_for = spec(directory_digest(TINY), steps=1).to_dict()
    site.start()
    deviations = []
    try:
        for number, labels in enumerate((["lungs", "heart"], ["lungs", "nobody"], ["nobody", "nowhere"]), start=1):
            made_for["task"]["labels"] = labels
            sealed = site.order(site.manifest(1, RunSpec.from_dict(made_for), run=f"demo-{number}"))
            assert sealed.status == "ok"
            update = unpack(sealed.payload)
            factors = [value.ravel() for name, value in update.items() if ".lora_" in name]
            deviations.append(float(np.concatenate(factors).std()))
            from_zero = np.concatenate([value.ravel() for name, value in update.items() if ".lora_B" in name])
            every = sum(value.size for value in update.values())
            assert off_the_grid(from_zero, dimensions=every, units=PATIENTS) == 0, labels
            assert off_the_grid(from_zero, dimensions=every, units=PATIENTS - 1) > 3
    finally:
        site.stop()
    assert deviations == pytest.approx([deviations[0]] * 3, rel=0.1)
    assert [spend.outcome for spend in site.spends()] == ["settled"] * 3
