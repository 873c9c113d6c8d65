"""The audit on the real engine, and on engines that are broken on purpose."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Qwen2MoeConfig

from fl_client.dp import engine as engine_module
from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.audit.canaries import (
    CanaryReport,
    audit_gradients,
    audit_records,
    clipped_gradients,
    random_records,
    worst_case_adapter,
)
from fl_client.dp.mechanism import noise
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.tasks.classification import CrossEntropy
from fl_shared.documents.spec import LoraSection
from fl_shared.errors import EngineError
from fl_shared.privacy.mechanism import Mechanism
from helpers.broken_books import PerTokenBook, UnclippedExpertsBook
from helpers.random_models import adapted_small

DELTA = 1e-5
CLASSES = 50


@pytest.fixture(scope="module")
def adapted() -> AdaptedModel:
    """A small Qwen2-MoE under a hostile coordinator's adapter."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    config = Qwen2MoeConfig(
        vocab_size=300, hidden_size=64, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, moe_intermediate_size=24, shared_expert_intermediate_size=16, num_experts=4,
        num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    model.set_experts_implementation("grouped_mm")
    lora = LoraSection(rank=4, alpha=4.0, targets=("attention", "shared_experts", "routed_experts"))
    made = adapt(model, lora, CrossEntropy(CLASSES), torch.zeros(64), torch.ones(64))
    worst_case_adapter(made, np.random.default_rng(0))
    return made


@pytest.fixture
def fixed_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sampling and noise from known keys, so that a verdict stays a verdict."""
    keys = iter(range(1000))
    monkeypatch.setattr(engine_module, "SecureStream", lambda: SecureStream(next(keys).to_bytes(32, "big")))


def _records(count: int, tokens: int = 40):  # type: ignore[no-untyped-def]
    return random_records(
        count, vocabulary=300, tokens=tokens, objective=CrossEntropy(CLASSES), rng=np.random.default_rng(3)
    )


def _audit(adapted: AdaptedModel, *, norm: float = 0.5):  # type: ignore[no-untyped-def]
    mechanism = Mechanism(noise_multiplier=3.0, sampling_probability=1.0, steps=1, clipping_norm=norm)
    return audit_records(adapted, _records(150), mechanism, guesses=80, delta=DELTA, coins=SecureStream(bytes(32)))


def scale_noise(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    """Break the engine's noise: every integer that is drawn shrinks."""
    right = noise._Draws.next

    def shrunk(self: noise._Draws, count: int) -> np.ndarray:
        return (right(self, count) * factor).astype(np.int64)

    monkeypatch.setattr(noise._Draws, "next", shrunk)


def test_the_right_engine_is_not_accused(adapted: AdaptedModel, fixed_streams: None) -> None:
    """The proof stays below the claim, and the audit could have accused several faults."""
    report = _audit(adapted)
    assert report.result.epsilon_lower < report.claimed_epsilon
    assert not report.accused
    assert report.power["none"] <= 0.1
    assert report.power["no noise"] > 0.9
    assert report.to_dict()["accused"] is False


def test_no_noise_is_accused(adapted: AdaptedModel, fixed_streams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that forgets the noise is accused."""
    scale_noise(monkeypatch, 0.0)
    assert _audit(adapted).accused


def test_per_token_clipping_is_accused(
    adapted: AdaptedModel, fixed_streams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that clips tokens instead of units is accused."""
    monkeypatch.setattr(engine_module, "GradientBook", PerTokenBook)
    assert _audit(adapted, norm=0.02).accused


def test_unclipped_experts_are_accused(
    adapted: AdaptedModel, fixed_streams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An engine that clips everything but the experts is accused."""
    monkeypatch.setattr(engine_module, "GradientBook", UnclippedExpertsBook)
    assert _audit(adapted, norm=0.02).accused


def _audit_gradients(adapted: AdaptedModel, sigma: float = 1.2):  # type: ignore[no-untyped-def]
    mechanism = Mechanism(noise_multiplier=sigma, sampling_probability=1.0, steps=1, clipping_norm=1.0)
    return audit_gradients(adapted, mechanism, canaries=9000, guesses=600, delta=DELTA, coins=SecureStream(bytes(32)))


def test_gradient_canaries_leave_the_right_engine_alone(adapted: AdaptedModel, fixed_streams: None) -> None:
    """Thousands of gradient canaries prove a positive epsilon below the claim."""
    report = _audit_gradients(adapted)
    assert 0 < report.result.epsilon_lower < report.claimed_epsilon


def test_quarter_noise_is_accused_by_gradient_canaries(
    adapted: AdaptedModel, fixed_streams: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Noise at a quarter of its scale is accused; the report says how likely that was for half."""
    scale_noise(monkeypatch, 0.25)
    report = _audit_gradients(adapted)
    assert report.accused
    assert 0 <= report.power["noise at half scale"] <= 1


def test_half_noise_is_accused_where_the_report_says_so(fixed_streams: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With a larger noise multiplier and 20,000 gradient canaries the audit has the power for half the noise."""
    wide = adapted_small("qwen2_moe", quantised=True, rank=12)
    mechanism = Mechanism(noise_multiplier=3.0, sampling_probability=1.0, steps=1, clipping_norm=1.0)

    def audited() -> CanaryReport:
        return audit_gradients(
            wide, mechanism, canaries=20_000, guesses=1000, delta=DELTA, coins=SecureStream(bytes(32))
        )

    right = audited()
    assert not right.accused
    assert right.power["noise at half scale"] > 0.95
    scale_noise(monkeypatch, 0.5)
    assert audited().accused


def test_gradient_canaries_claim_no_power_over_clipping(adapted: AdaptedModel, fixed_streams: None) -> None:
    """They bypass the clipping, so the report promises no more for a fault there than for none."""
    report = _audit_gradients(adapted, 3.0)
    for fault in ("clipping per token, 8 tokens", "no clipping, norm 10 C"):
        assert report.power[fault] == report.power["none"] < 0.1


def test_clipped_gradients_never_exceed_the_norm(adapted: AdaptedModel) -> None:
    """The guesser's own gradients have at most the clipping norm, and reach it when it is small."""
    rows = clipped_gradients(adapted, _records(5), 0.02)
    np.testing.assert_allclose(np.linalg.norm(rows.astype(float), axis=1), 0.02, rtol=1e-5)


def test_too_many_canaries_are_refused(adapted: AdaptedModel) -> None:
    """More gradient canaries than coordinates cannot be."""
    mechanism = Mechanism(noise_multiplier=1.0, sampling_probability=1.0, steps=1, clipping_norm=1.0)
    with pytest.raises(EngineError, match="gradient canaries"):
        audit_gradients(adapted, mechanism, canaries=10**7, guesses=2, delta=DELTA)
