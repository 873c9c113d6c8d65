"""Every layout of weights on disk ends in the same int8 model, and what cannot be read is refused by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, GraniteMoeConfig, PhimoeConfig, PreTrainedModel, PreTrainedTokenizerFast

from fl_client.model.architectures import Architecture, known_architectures
from fl_client.model.inspect import inspect_directory
from fl_client.model.layout import expert_modules, quantised_linears, skeleton, stored_tensors
from fl_client.model.load import load_model
from fl_client.model.quantise import quantise_directory
from fl_client.model.quantised.layers import dequantise, quantise_tensor
from fl_shared.errors import ModelError

Make = Callable[[str], tuple[PreTrainedModel, Path]]
IDS = torch.tensor([[5, 300, 17, 4, 260, 99], [31, 2, 7, 7, 280, 11]])


def rounded(model: PreTrainedModel, bits: int = 8) -> dict[str, torch.Tensor]:
    """The float model's own state with each quantised tensor replaced by what its quantised form stands for."""
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    names = [f"{name}.weight" for name in quantised_linears(model)]
    names += [f"{name}.{part}" for name in expert_modules(model) for part in ("gate_up_proj", "down_proj")]
    for name in names:
        state[name] = dequantise(*quantise_tensor(state[name], 128, bits), 128, torch.float32)
    return state


def test_every_architecture_computes_what_its_rounded_weights_compute(
    architecture: str, float_model: Make, tmp_path: Path
) -> None:
    """The loaded int8 model's logits equal those of the float model that holds the dequantised weights."""
    model, directory = float_model(architecture)
    quantise_directory(directory, tmp_path / "q")
    loaded = load_model(tmp_path / "q", "cpu")
    with torch.no_grad():
        twin = torch.func.functional_call(model, rounded(model), (IDS,), {"use_cache": False}, tie_weights=False)
        torch.testing.assert_close(loaded.module(IDS).logits, twin.logits, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(IDS).logits, twin.logits, rtol=1e-4, atol=1e-5), "rounding is visible"
    assert not any(parameter.requires_grad for parameter in loaded.module.parameters())


def test_router_embeddings_norms_and_head_stay_float(architecture: str, float_model: Make, tmp_path: Path) -> None:
    """Attention, MLPs and experts become int8 with one scale per 128 inputs; all else keeps name, dtype and value."""
    model, directory = float_model(architecture)
    quantise_directory(directory, tmp_path / "q")
    written = load_file(tmp_path / "q" / "model.safetensors")
    quantised = {name for name in written if name.endswith("qweight")}
    scales = {name.removesuffix("qweight") + "scale" for name in quantised}
    assert any(".experts." in name for name in quantised)
    assert any("self_attn" in name for name in quantised)
    kept = ("embed", "lm_head", "norm", "router", "mlp.gate.", "shared_expert_gate")
    assert [name for name in quantised if any(word in name for word in kept)] == []
    for name in quantised:
        tensor = written[name]
        assert tensor.dtype == torch.int8
        assert written[name.removesuffix("qweight") + "scale"].shape == (
            *tensor.shape[:-1],
            -(-tensor.shape[-1] // 128),
        )
    state = model.state_dict()
    rest = set(written) - quantised - scales
    assert rest
    assert [name for name in rest if not torch.equal(written[name], state[name])] == []


def test_a_new_family_is_quantised_as_its_file_says(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PhiMoE's router is a linear layer called `router`; named in its file, it stays float."""
    family = Architecture(
        model_type="phimoe",
        attention=tuple(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "o_proj")),
        shared_experts=(),
        routed_experts="mlp.experts",
        router=("mlp.router",),
        renames=((".block_sparse_moe.gate.weight", ".mlp.router.weight"),),
    )
    monkeypatch.setitem(known_architectures(), "phimoe", family)
    torch.manual_seed(7)
    config = PhimoeConfig(
        vocab_size=320, hidden_size=200, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        intermediate_size=136, num_local_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "phi")
    tokenizer.save_pretrained(tmp_path / "phi")
    quantise_directory(tmp_path / "phi", tmp_path / "q")
    written = load_file(tmp_path / "q" / "model.safetensors")
    for layer in ("model.layers.0", "model.layers.1"):
        assert torch.equal(written[f"{layer}.mlp.router.weight"], model.state_dict()[f"{layer}.mlp.router.weight"])
        assert f"{layer}.mlp.experts.down_proj_qweight" in written
        assert f"{layer}.self_attn.o_proj.qweight" in written
    loaded = load_model(tmp_path / "q", "cpu")
    with torch.no_grad():
        twin = torch.func.functional_call(model, rounded(model), (IDS,), {"use_cache": False}, tie_weights=False)
        torch.testing.assert_close(loaded.module(IDS).logits, twin.logits, rtol=1e-4, atol=1e-5)


def test_experts_and_what_a_router_holds_go_by_the_familys_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another name for the experts' module is followed, and linear layers inside a router stay float."""

    class Layer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.moe = nn.ModuleDict(
                {"pool": nn.Identity(), "experts": nn.Identity(), "chooser": nn.ModuleDict({"layer": nn.Linear(2, 2)})}
            )
            self.chooser_proj = nn.Linear(2, 2)

    model: Any = nn.Module()
    model.layers, model.lm_head = nn.ModuleList([Layer()]), nn.Linear(2, 2)
    model.config = SimpleNamespace(model_type="other")
    family = Architecture("other", (), (), routed_experts="moe.pool", router=("moe.chooser",))
    monkeypatch.setitem(known_architectures(), "other", family)
    assert set(quantised_linears(model)) == {"layers.0.chooser_proj"}
    assert set(expert_modules(model)) == {"layers.0.moe.pool"}


def test_fused_experts_on_disk_give_the_same_int8_as_one_matrix_each(
    architecture: str, float_model: Make, tmp_path: Path
) -> None:
    """A checkpoint that stores `experts.gate_up_proj` whole is quantised like one with a matrix per expert."""
    model, directory = float_model(architecture)
    fused = tmp_path / "fused"
    fused.mkdir()
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(directory / name, fused / name)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    if model.config.tie_word_embeddings:
        state.pop("lm_head.weight")
    save_file(state, fused / "model.safetensors")
    quantise_directory(directory, tmp_path / "a")
    quantise_directory(fused, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()


def test_experts_are_read_one_at_a_time(architecture: str, float_model: Make) -> None:
    """Whatever the layout, no piece that is read for an expert tensor is larger than one expert's part of it."""
    _, directory = float_model(architecture)
    shapes = {name: tensor.shape for name, tensor in skeleton(directory).state_dict().items()}
    seen = 0
    for stored in stored_tensors(directory):
        if len(shapes[stored.name]) == 3:
            pieces = [piece.shape for piece in stored.read(by_expert=True)]
            assert pieces == [shapes[stored.name][1:]] * shapes[stored.name][0], stored.name
            seen += 1
    assert seen >= 2


def test_expert_ten_comes_after_expert_two(tmp_path: Path) -> None:
    """Experts are stacked by number, not by the order of their names."""
    directory = tmp_path / "twelve"
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps({"model_type": "olmoe"}), encoding="utf-8")
    parts = ("gate_proj", "up_proj", "down_proj")
    tensors = {
        f"model.layers.0.mlp.experts.{expert}.{part}.weight": torch.full((2, 2), float(expert))
        for expert in range(12)
        for part in parts
    }
    save_file(tensors, directory / "model.safetensors")
    for stored in stored_tensors(directory):
        assert [int(piece[0, 0]) for piece in stored.read(by_expert=True)] == list(range(12))


def test_four_bits_are_packed_and_compute_what_they_stand_for(
    architecture: str, float_model: Make, tmp_path: Path
) -> None:
    """With bits = 4 files and memory hold two weights a byte; logits are those of the rounded weights; errors grow."""
    model, directory = float_model(architecture)
    report = quantise_directory(directory, tmp_path / "q4", bits=4)
    quantise_directory(directory, tmp_path / "q8", bits=8)
    config = json.loads((tmp_path / "q4/config.json").read_text(encoding="utf-8"))
    assert config["concordat_quantisation"] == {"bits": 4, "group": 128}
    facts, wide = inspect_directory(tmp_path / "q4"), inspect_directory(tmp_path / "q8")
    assert (facts.bits, wide.bits) == (4, 8)
    assert facts.quantised_layers_bytes == report.quantised_after
    assert facts.digest != wide.digest
    four, eight = load_model(tmp_path / "q4", "cpu"), load_model(tmp_path / "q8", "cpu")
    assert four.digest == facts.digest
    for name, tensor in four.module.state_dict().items():
        if name.endswith("qweight"):
            assert tensor.dtype == torch.uint8
            assert tensor.numel() < 0.6 * eight.module.state_dict()[name].numel()
    with torch.no_grad():
        twin = torch.func.functional_call(model, rounded(model, 4), (IDS,), {"use_cache": False}, tie_weights=False)
        found, exact = four.module(IDS).logits, model(IDS).logits
        torch.testing.assert_close(found, twin.logits, rtol=1e-4, atol=1e-5)
        assert (found - exact).norm() > 4 * (eight.module(IDS).logits - exact).norm()


def test_computing_in_bfloat16_stays_close(float_model: Make, tmp_path: Path) -> None:
    """dtype=bfloat16 computes in it, keeps scales in float32, and its hidden states stay within 5 %."""
    _, directory = float_model("mixtral")
    quantise_directory(directory, tmp_path / "q")
    exact, half = load_model(tmp_path / "q", "cpu"), load_model(tmp_path / "q", "cpu", torch.bfloat16)
    kinds = {name.rpartition(".")[2]: tensor.dtype for name, tensor in half.module.state_dict().items()}
    assert (kinds["scale"], kinds["qweight"], kinds["weight"]) == (torch.float32, torch.int8, torch.bfloat16)
    with torch.no_grad():
        wanted = exact.module.get_submodule("model")(IDS).last_hidden_state
        found = half.module.get_submodule("model")(IDS).last_hidden_state
    assert found.dtype == torch.bfloat16
    assert (found.float() - wanted).norm() < 0.05 * wanted.norm()


def test_attention_runs_through_sdpa(architecture: str, float_model: Make, tmp_path: Path) -> None:
    """Every architecture's attention goes to scaled_dot_product_attention, which has FlashAttention on CUDA."""
    _, directory = float_model(architecture)
    quantise_directory(directory, tmp_path / "q")
    module = load_model(tmp_path / "q", "cpu").module
    with mock.patch.object(F, "scaled_dot_product_attention", wraps=F.scaled_dot_product_attention) as spy:
        module(IDS)
    assert spy.call_count == vars(module)["config"].num_hidden_layers


def _damaged(good: Path, target: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Path:
    shutil.copytree(good, target)
    save_file(change(load_file(good / "model.safetensors")), target / "model.safetensors")
    return target


def _with_value(tensors: dict[str, torch.Tensor], part: str, value: float) -> dict[str, torch.Tensor]:
    name = next(each for each in tensors if part in each)
    tensors[name].view(-1)[3] = value
    return tensors


WRONG: dict[str, tuple[Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]], str]] = {
    "one expert's matrix": (lambda t: {n: v for n, v in t.items() if ".experts.2.up_proj" not in n}, "no up matrix"),
    "the last expert": (lambda t: {n: v for n, v in t.items() if ".experts.3." not in n}, "has 3 experts"),
    "a norm": (lambda t: {n: v for n, v in t.items() if "input_layernorm" not in n}, "lacks .*input_layernorm"),
    "an untied head": (lambda t: {n: v for n, v in t.items() if n != "lm_head.weight"}, "lacks lm_head"),
    "another width": (
        lambda t: {n: v[:, :-1].clone() if "q_proj.w" in n else v for n, v in t.items()},
        "q_proj.*shape",
    ),
    "NaN in int8": (lambda t: _with_value(t, "q_proj.weight", float("nan")), "q_proj.*NaN"),
    "infinity in an expert": (lambda t: _with_value(t, "experts.1.down_proj", float("inf")), "down_proj.*infinity"),
    "NaN in a norm": (lambda t: _with_value(t, "input_layernorm", float("nan")), "input_layernorm.*NaN"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_weights_are_refused_by_name_and_leave_nothing_usable(
    what: str, float_model: Make, tmp_path: Path
) -> None:
    """A missing, misshapen or non-finite tensor stops the quantiser, which names it; no half-made model loads."""
    change, words = WRONG[what]
    bad = _damaged(float_model("qwen2_moe")[1], tmp_path / "bad", change)
    with pytest.raises(ModelError, match=words) as caught:
        quantise_directory(bad, tmp_path / "out")
    assert caught.value.fix
    with pytest.raises(ModelError):
        load_model(tmp_path / "out", "cpu")


def test_wrong_directories_and_options_are_refused(float_model: Make, tmp_path: Path) -> None:
    """Nowhere, nothing, pickle only, a dense model, twice, an odd width, a full folder: each is said."""
    _, good = float_model("mixtral")
    quantise_directory(good, tmp_path / "done")
    empty, pickled, dense = tmp_path / "empty", tmp_path / "pickled", tmp_path / "dense"
    for folder in (empty, pickled, dense):
        folder.mkdir()
    shutil.copyfile(good / "config.json", pickled / "config.json")
    (pickled / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    (dense / "config.json").write_text('{"model_type": "llama"}', encoding="utf-8")
    for source, words in (
        (tmp_path / "nowhere", "no readable config.json"),
        (empty, "no readable config.json"),
        (pickled, "no safetensors weights"),
        (dense, "'llama' is not supported"),
        (tmp_path / "done", "already quantised"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            quantise_directory(source, tmp_path / f"out-{source.name}")
        assert caught.value.fix, source
    with pytest.raises(ModelError, match="3 bits"):
        quantise_directory(good, tmp_path / "odd", bits=3)
    with pytest.raises(ModelError, match="holds files"):
        quantise_directory(good, tmp_path / "done")


@pytest.mark.parametrize("settings", [{}, {"bits": 8}, {"bits": 8, "group": 0}, {"bits": "8", "group": 128}, 8, None])
def test_a_malformed_quantisation_entry_is_refused(settings: object, float_model: Make, tmp_path: Path) -> None:
    """config.json's own entry is validated before any weight is read."""
    _, good = float_model("mixtral")
    quantise_directory(good, tmp_path / "q")
    path = tmp_path / "q/config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "concordat_quantisation": settings}), encoding="utf-8")
    with pytest.raises(ModelError, match="concordat_quantisation") as caught:
        load_model(tmp_path / "q", "cpu")
    assert caught.value.fix


_PEAK = """
import resource, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
from fl_client.model.load import load_model
load_model(sys.argv[1], "cpu")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
model = load_model(sys.argv[2], "cpu")
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""


def test_loading_an_int8_model_makes_no_float_copy(tmp_path: Path, float_model: Make) -> None:
    """For 200 MB of float experts, loading their int8 form grows the peak memory by far less."""
    _, small = float_model("granitemoe")
    quantise_directory(small, tmp_path / "small")
    big = tmp_path / "big"
    shutil.copytree(small, big)
    config = GraniteMoeConfig(
        vocab_size=320,
        hidden_size=512,
        intermediate_size=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=12,
        num_experts_per_tok=2,
    )
    (big / "config.json").write_text(config.to_json_string(), encoding="utf-8")
    shapes = {name: tensor.shape for name, tensor in skeleton(big).state_dict().items()}
    fill = {name: torch.full(shape, 0.01) for name, shape in shapes.items()}
    if config.tie_word_embeddings:
        fill.pop("lm_head.weight")
    save_file(fill, big / "model.safetensors")
    floats = (big / "model.safetensors").stat().st_size
    assert floats > 190e6
    del fill
    quantise_directory(big, tmp_path / "q")
    done = subprocess.run(
        [sys.executable, "-c", _PEAK, str(tmp_path / "small"), str(tmp_path / "q")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout.split()[-1]) < 0.45 * floats
