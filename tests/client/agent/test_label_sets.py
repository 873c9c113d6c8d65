"""The coordinator chooses a run's labels: what an update looks like must not tell how many units have one of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from client_agents import RealSite, spec
from client_gateway import Gateway

from fl_client.model.layout import directory_digest
from fl_client.model.load import TINY
from fl_shared.adapter import unpack
from fl_shared.manifest import RunSpec


def test_the_noise_does_not_tell_how_many_units_have_the_runs_labels(tmp_path: Path, gateway: Gateway) -> None:
    """All units, half of them, none: a real agent answers each order with noise of one and the same deviation."""
    site = RealSite(tmp_path / "home", gateway)
    made_for = spec(directory_digest(TINY)).to_dict()
    site.start()
    deviations = []
    try:
        for number, labels in enumerate((["lungs", "heart"], ["lungs", "nobody"], ["nobody", "nowhere"]), start=1):
            made_for["task"]["labels"] = labels
            sealed = site.order(site.manifest(1, RunSpec.from_dict(made_for), run=f"demo-{number}"))
            assert sealed.status == "ok"
            factors = [value.ravel() for name, value in unpack(sealed.payload).items() if ".lora_" in name]
            deviations.append(float(np.concatenate(factors).std()))
    finally:
        site.stop()
    assert deviations == pytest.approx([deviations[0]] * 3, rel=0.1)
    assert [spend.outcome for spend in site.spends()] == ["settled"] * 3
