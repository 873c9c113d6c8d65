"""Engine `hooks`, one unit at a time: for architectures that cannot be packed and machines that are refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fl_client.data.units import UnitData
from fl_client.dp import checks
from fl_client.dp.adapt import AdaptedModel, remove
from fl_client.dp.checks import check_layers
from fl_client.dp.rounding import slack
from fl_client.inference.predict import predict
from fl_client.model.load import TINY, load_model
from fl_client.training.round import train_round
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import Mechanism
from helpers.clipped import clipped_sum
from helpers.hostile_adapters import ATTACKS, company, same_bits, without_last
from helpers.random_models import adapted_small
from helpers.specs import run_spec


def make_stubborn(adapted: AdaptedModel) -> None:
    """Let its layers attend as they always did, whatever implementation is asked for: a packed row sees all others."""
    backbone: Any = adapted.module.backbone
    for layer in backbone.layers:
        own = layer.self_attn.forward

        def forward(hidden_states: Tensor, *rest: Any, attention_mask: Any = None, own: Any = own, **named: Any) -> Any:
            before, backbone.config._attn_implementation = backbone.config._attn_implementation, "eager"
            tokens = hidden_states.shape[1]
            seen = torch.ones(tokens, tokens, dtype=torch.bool).tril()[None, None]
            if attention_mask is not None:
                seen = attention_mask if attention_mask.dtype == torch.bool else attention_mask == 0
            mask = torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)
            try:
                return own(hidden_states, *rest, attention_mask=mask, **named)
            finally:
                backbone.config._attn_implementation = before

        layer.self_attn.forward = forward


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe"])
def test_an_architecture_that_cannot_be_packed_is_checked_and_trained_by_hooks(architecture: str) -> None:
    """`book` refuses it; unit by unit its gradients are the loop's, and one unit moves no other by a bit."""
    adapted = adapted_small(architecture, quantised=True)
    make_stubborn(adapted)
    with pytest.raises(EngineError, match="are off by"):
        check_layers(adapted, vocabulary=96)
    assert check_layers(adapted, vocabulary=96, engine="hooks") < 1e-5
    ATTACKS["large"](adapted, np.random.default_rng(3))
    records = company(np.random.default_rng(5), units=8, vocabulary=96, classes=5, low=3, high=9, longer=31)
    whole, rest = (clipped_sum(adapted, each, 0.5, engine="hooks") for each in (records, without_last(records)))
    alone = dataclasses.replace(records, of_unit=records.of_unit[-1:])
    last = clipped_sum(adapted, alone, 0.5, engine="hooks")
    change = sum(float((whole[name] - rest[name]).square().sum()) for name in whole) ** 0.5
    assert change <= 0.5 * (1 + slack(units=9, rows=4096))
    apart = max(float((whole[name] - rest[name] - last[name]).abs().max()) for name in whole)
    assert apart < 1e-14  # float64 additions, and nothing else


def test_a_hooks_check_that_passed_says_nothing_about_the_book() -> None:
    """Each engine is checked for itself."""
    adapted = adapted_small("mixtral", quantised=True)
    check_layers(adapted, vocabulary=96, engine="hooks")
    make_stubborn(adapted)
    with pytest.raises(EngineError, match="are off by"):
        check_layers(adapted, vocabulary=96)


def test_a_site_whose_engine_is_hooks_trains_and_answers_where_the_machine_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The model says the engine; the check of shapes, which refuses here, is not asked."""

    def refused(*_: object, **__: object) -> None:
        raise EngineError("depends on its neighbours on this machine", fix="-")

    monkeypatch.setattr(checks, "check_invariance", refused)
    model = load_model(TINY, device="cpu")
    spec = run_spec(base_model=model.digest, labels=["x", "y"], sampling_probability=0.9, steps_per_round=1)
    mechanism = Mechanism(1.0, 0.9, 1, 1.0)
    data = UnitData(("a cough", "fever and cough", "pain"), ("x", "y", "x"), np.array([0, 0, 1]), 2, "f" * 64)
    with pytest.raises(EngineError, match="depends on its neighbours"):
        train_round(model, data, spec, mechanism, {}, round=1)
    alone = dataclasses.replace(model, engine="hooks")
    assert train_round(alone, data, spec, mechanism, {}, round=1).report["engine"] == "hooks"
    answers = predict(alone, {"classifier.bias": np.array([0.0, 2.0], np.float32)}, data.texts, spec)
    assert answers.shape == (3, 2)
    one = predict(alone, {"classifier.bias": np.array([0.0, 2.0], np.float32)}, data.texts[1:2], spec)
    assert same_bits(torch.from_numpy(answers[1:2]), torch.from_numpy(one))
    remove(model.module)
