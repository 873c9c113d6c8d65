"""What stops a round before anything leaves: layers that mix examples, plans that are not met, tensors that moved."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fl_client.dp import checks
from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.checks import StepCheck, check_layers
from fl_client.dp.initial import initial_tensors
from fl_client.dp.layers import lora as lora_layers
from fl_client.dp.layers.book import GradientBook
from fl_client.model.architectures import architecture_of, known_architectures
from fl_client.tasks.classification import CrossEntropy
from fl_shared.documents.spec import LoraSection
from fl_shared.errors import EngineError
from helpers.random_models import ARCHITECTURES, adapted_small, float_model, small_config

LORA = LoraSection(rank=2, alpha=2.0, targets=("attention", "routed_experts"))


@pytest.fixture
def adapted() -> AdaptedModel:
    """A small int8 model."""
    return adapted_small("qwen3_moe", quantised=True)


@pytest.mark.parametrize("quantised", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_supported_family_passes_the_probe(architecture: str, quantised: bool) -> None:
    """The probe finds the right engine exact, and leaves every weight as it was."""
    made = adapted_small(architecture, quantised=quantised)
    before = {name: value.clone() for name, value in made.module.state_dict().items()}
    assert check_layers(made, vocabulary=96) < 1e-5
    after = made.module.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_every_family_has_a_test() -> None:
    """A new architecture's file needs a small config in the tests."""
    assert set(known_architectures()) == set(ARCHITECTURES)


def test_a_layer_that_mixes_examples_is_refused(adapted: AdaptedModel) -> None:
    """A hidden state that sees the batch's mean passes every shape check; the probe notices."""

    def mixed(_module: nn.Module, _args: Any, out: Tensor) -> Tensor:
        return out + 0.1 * out.flatten(0, -2).mean(0)

    adapted.module.backbone.get_submodule("layers.0.self_attn.o_proj").register_forward_hook(mixed)
    with pytest.raises(EngineError, match="are off by"):
        check_layers(adapted, vocabulary=96)


class _LosesOneExpert(GradientBook):
    """A book that forgets one factor of the experts."""

    def add_expert_factor(self, parameter: nn.Parameter, *rest: Any) -> None:
        if parameter.shape[1] != 136:
            super().add_expert_factor(parameter, *rest)


def test_a_tensor_that_the_pass_does_not_reach_is_named(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A planned tensor without an entry in the book stops the round by name, at the start and in every step."""
    monkeypatch.setattr("fl_client.dp.engine.GradientBook", _LosesOneExpert)
    with pytest.raises(EngineError, match=r"does not reach the plan: .*lora_B"):
        check_layers(adapted, vocabulary=96)


def test_an_unplanned_trainable_parameter_is_named(adapted: AdaptedModel) -> None:
    """A router that somebody unfroze."""
    router = next(name for name, _ in adapted.module.named_parameters() if "mlp.gate" in name)
    adapted.module.get_parameter(router).requires_grad_(True)
    with pytest.raises(EngineError, match=r"mlp\.gate.* is trainable without being planned"):
        check_layers(adapted, vocabulary=96)


def test_tied_planned_tensors_are_refused(adapted: AdaptedModel) -> None:
    """One tensor under two names would be clipped and noised once, and stepped twice."""
    names = [name for name in adapted.trainable if "q_proj.lora_A" in name]
    adapted.trainable[names[1]] = adapted.trainable[names[0]]
    with pytest.raises(EngineError, match="share memory"):
        check_layers(adapted, vocabulary=96)


def move(adapted: AdaptedModel, *still: str) -> None:
    """A step that moves every planned tensor but these."""
    with torch.no_grad():
        for name, parameter in adapted.trainable.items():
            if name not in still:
                parameter.add_(1.0)


def test_a_step_as_planned_passes(adapted: AdaptedModel) -> None:
    """Everything planned moved, the frozen factor did not, nothing else was written to."""
    frozen = frozenset(name for name in adapted.trainable if ".lora_A" in name)
    check = StepCheck(adapted, frozen)
    for number in (1, 2):
        move(adapted, *frozen)
        check.after(number)


def test_a_planned_tensor_that_did_not_move_is_no_fault(adapted: AdaptedModel) -> None:
    """Whether a tensor moves depends on rates, noise and sample; a round must not end over it."""
    check = StepCheck(adapted, frozenset())
    check.after(1)


def test_a_frozen_factor_that_moved_is_named(adapted: AdaptedModel) -> None:
    """Aggregation with a frozen factor A would not be exact any more."""
    frozen = frozenset(name for name in adapted.trainable if ".lora_A" in name)
    check = StepCheck(adapted, frozen)
    move(adapted)
    with pytest.raises(EngineError, match=r"lora_A.* moved although frozen"):
        check.after(1)


@pytest.mark.parametrize("number", [1, 7])
@pytest.mark.parametrize("kind", ["written", "replaced"])
def test_a_base_weight_that_changed_is_named_in_any_step(adapted: AdaptedModel, number: int, kind: str) -> None:
    """Int8 weights, norms, routers and buffers: written in place or exchanged, in the first step or a later one."""
    check = StepCheck(adapted, frozenset())
    move(adapted)
    norm = adapted.module.backbone.get_submodule("layers.1.input_layernorm")
    weight = norm.get_parameter("weight")
    with torch.no_grad():
        if kind == "written":
            weight.mul_(1.0)
        else:
            norm.weight = nn.Parameter(weight.clone(), requires_grad=False)
    with pytest.raises(EngineError, match=r"input_layernorm\.weight is frozen and was written to"):
        check.after(number)


def test_an_unknown_family_is_refused_by_name() -> None:
    """Nothing is guessed from the layers' names."""
    with pytest.raises(EngineError, match="models of type 'llama' are not supported") as caught:
        architecture_of("llama")
    assert "architectures" in caught.value.fix
    model = float_model(small_config("olmoe"))
    vars(model)["config"].model_type = "gpt_oss"
    with pytest.raises(EngineError, match="gpt_oss"):
        adapt(model, LORA, CrossEntropy(2), torch.zeros(136), torch.ones(136))


def test_an_unknown_layer_is_refused_by_name() -> None:
    """A target that is neither linear nor fused experts, and experts with another layout."""
    model = float_model(small_config("olmoe"))
    model.get_submodule("model.layers.1.self_attn").q_proj = nn.Identity()
    with pytest.raises(EngineError, match=r"layers\.1\.self_attn\.q_proj is a Identity"):
        adapt(model, LORA, CrossEntropy(2), torch.zeros(136), torch.ones(136))
    model = float_model(small_config("olmoe"))
    vars(model.get_submodule("model.layers.0.mlp.experts"))["is_transposed"] = True
    with pytest.raises(EngineError, match="another layout"):
        adapt(model, LORA, CrossEntropy(2), torch.zeros(136), torch.ones(136))


def test_a_group_that_the_model_lacks_is_refused() -> None:
    """Mixtral has no shared experts."""
    model = float_model(small_config("mixtral"))
    with pytest.raises(EngineError, match="has no shared_experts"):
        adapt(
            model,
            LoraSection(2, 2.0, ("attention", "shared_experts")),
            CrossEntropy(2),
            torch.zeros(136),
            torch.ones(136),
        )


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_no_router_is_ever_planned(architecture: str) -> None:
    """The plan holds LoRA factors of the named groups and the head, and no router's."""
    made = adapted_small(architecture, quantised=True)
    routers = architecture_of(architecture).router
    assert routers
    for name in made.trainable:
        assert ".lora_" in name or name.startswith("classifier.")
        assert not any(f".{router}.lora" in name for router in routers)
    assert {p for p in made.module.parameters() if p.requires_grad} == set(made.trainable.values())
    assert lora_layers.ADAPTER == "default"


def test_nan_gradients_do_not_pass_the_probe(adapted: AdaptedModel) -> None:
    """NaN is larger than no bound: it must not get lost in a maximum."""

    def spoil(_module: nn.Module, grads: tuple[Tensor, ...] | Tensor) -> tuple[Tensor, ...]:
        return tuple(g * float("nan") for g in grads)

    adapted.module.backbone.get_submodule("norm").register_full_backward_pre_hook(spoil)
    with pytest.raises(EngineError, match="are off by inf"):
        check_layers(adapted, vocabulary=96)
    assert adapted.probe_error is None


def test_a_probe_that_shows_nothing_does_not_pass(adapted: AdaptedModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head so sure of a unit's label that its gradient vanishes: typed, and no pass, whichever label it is."""
    found = []
    for label in range(5):
        start = initial_tensors(adapted, 7)
        start["classifier.bias"][label] = 200.0
        monkeypatch.setattr(checks, "initial_tensors", lambda *_, start=start: start)
        adapted.probe_error = None
        try:
            found.append(check_layers(adapted, vocabulary=96) < 1e-5)
        except EngineError:
            found.append(False)
    assert not all(found)  # some unit of the probe has one label alone
    assert any(found)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
@pytest.mark.parametrize("architecture", ["qwen3_moe", "deepseek_v3"])
def test_frequencies_that_follow_the_longest_record_are_refused(architecture: str, kind: str) -> None:
    """Dynamic NTK and LongRoPE recompute the rotary frequencies from whatever shares the micro-batch."""
    config = small_config(architecture)
    config.max_position_embeddings = 16
    head = int(getattr(config, "qk_rope_head_dim", None) or config.head_dim)
    config.rope_parameters = {"rope_type": kind, "factor": 4.0, "rope_theta": 1e4} | (
        {"short_factor": [1.0] * (head // 2), "long_factor": [2.0] * (head // 2),
         "original_max_position_embeddings": 16} if kind == "longrope" else {}
    )  # fmt: skip
    model = float_model(config)
    with pytest.raises(EngineError, match=f"rope_type '{kind}'"):
        adapt(model, LORA, CrossEntropy(5), torch.zeros(136), torch.ones(136))
