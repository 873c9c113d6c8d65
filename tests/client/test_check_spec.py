"""`fl-client check --spec`: a spec is held against policy and base model before anybody launches it."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from fl_client.agent.check import run_checks
from fl_client.model.layout import target_groups
from fl_client.site.config import SiteConfig
from fl_shared.documents.spec import RunSpec
from helpers.agents import SITE, RealSite, spec
from helpers.gateway import Gateway
from helpers.random_models import float_model, small_config
from helpers.smallest import smallest_digest

OTHER = "sha256:" + "0" * 64
WITHOUT_SHARED = ("qwen3_moe", "olmoe", "mixtral", "granitemoe")


def test_check_with_a_spec_says_what_a_round_would_refuse(tmp_path: Path, gateway: Gateway) -> None:
    """A spec that fits passes; another base, a policy limit, a missing site each fail with a fix; all of it is free."""
    site = RealSite(tmp_path / "home", gateway)
    right = spec(smallest_digest())
    training = dataclasses.replace(right.training, noise_multiplier=0.1)
    cases: dict[str, tuple[RunSpec, str]] = {
        "fits": (right, ""),
        "base": (dataclasses.replace(right, run=dataclasses.replace(right.run, base_model=OTHER)), "base model"),
        "policy": (dataclasses.replace(right, training=training), "noise_multiplier"),
        "site": (dataclasses.replace(right, run=dataclasses.replace(right.run, sites=("other",))), "does not name"),
    }
    for name, (asked, wrong) in cases.items():
        (found,) = [each for each in run_checks(site.home, SITE, asked) if each.name == "spec"]
        assert (found.ok, wrong in found.message) == (not wrong, True), (name, found)
        assert bool(found.fix) == bool(wrong), name
    assert SiteConfig.load(site.home, SITE).policy.reply_every_s == 1.0
    assert not site.home.ledger.exists()


@pytest.mark.parametrize("family", [*WITHOUT_SHARED, "deepseek_v2", "deepseek_v3", "qwen2_moe"])
def test_the_groups_that_a_base_has(family: str) -> None:
    """Four families have no shared experts; the answer is the one that the engine would give."""
    shared = () if family in WITHOUT_SHARED else ("shared_experts",)
    assert target_groups(float_model(small_config(family))) == ("attention", *shared, "routed_experts")
