"""The announcement of the base model: what the agent tells, when, and what a coordinator that is away changes."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from fl_client.agent.announcement import EVERY_S, Announcer
from fl_client.agent.questions import RETRY_S
from fl_client.agent.site import base_digest, base_targets
from fl_client.site.config import SiteConfig
from fl_shared.documents.base_model import BaseModel
from fl_shared.errors import EnrolmentError, TransportError
from helpers.agents import SITE, RealSite
from helpers.gateway import Gateway

BASE = BaseModel("sha256:" + "1" * 64, ("attention", "routed_experts"))


@pytest.mark.parametrize("answers_plans", [True, False])
def test_an_agent_announces_its_base_and_nothing_else(tmp_path: Path, gateway: Gateway, answers_plans: bool) -> None:
    """Digest and groups of the files that it has loaded, with and without answers to plans; nothing is spent."""
    site = RealSite(tmp_path / "home", gateway)
    if not answers_plans:
        text = site.home.config.read_text()
        site.home.config.write_text(text.replace("[policy]\n", "[policy]\nanswer_plans = false\n"))
    site.start()
    try:
        deadline = time.monotonic() + 60
        while not gateway.announced and time.monotonic() < deadline:
            time.sleep(0.1)
        config = SiteConfig.load(site.home, SITE)
        base = BaseModel(base_digest(config), base_targets(config))
        assert gateway.announced == [base.to_dict()]
        assert gateway.orders_read == ["2"]
        assert base.targets == ("attention", "shared_experts", "routed_experts")
        assert site.spends() == []
    finally:
        site.stop()


def test_a_coordinator_that_is_away_or_older_is_told_again_and_warned_of_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """No answer, then a coordinator without this path (404), then one that takes it; the thread goes on through all."""
    answers: list[Exception | None] = [TransportError("away"), EnrolmentError("there is nothing here"), None]
    told: list[Any] = []

    def call(method: str, path: str, body: Any = None) -> dict[str, Any]:
        told.append((method, path, body))
        if error := answers[len(told) - 1]:
            raise error
        return {"taken": True}

    announcer = Announcer(call, BASE)
    assert [announcer.tell() for _ in answers] == [RETRY_S, RETRY_S, EVERY_S]
    assert told == [("POST", "/v1/base", BASE.to_dict())] * 3
    assert BaseModel.from_dict(told[0][2]) == BASE
    assert len([each for each in caplog.records if each.name == "fl_client.announcement"]) == 1
