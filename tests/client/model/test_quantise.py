"""Quantising and loading: every architecture, streaming, and what broken directories get."""

from __future__ import annotations

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PretrainedConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

from fl_client.model.inspect import inspect_directory
from fl_client.model.layout import directory_digest
from fl_client.model.load import TINY, load_model
from fl_client.model.quant_layers import QuantExperts, QuantLinear, dequantise, quantise_tensor
from fl_client.model.quantise import quantise_directory
from fl_shared.errors import ModelError

torch.set_num_threads(1)
VOCABULARY = 256
_COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 192,  # no multiple of 128: the last group is shorter
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_GQA = {"num_key_value_heads": 2, **_COMMON}
_MLA = {
    **_COMMON,
    "num_key_value_heads": 4,
    "intermediate_size": 160,
    "moe_intermediate_size": 96,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "kv_lora_rank": 32,
    "q_lora_rank": None,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
}
CONFIGS: dict[str, PretrainedConfig] = {
    "deepseek_v2": DeepseekV2Config(**_MLA),
    "deepseek_v3": DeepseekV3Config(**_MLA, n_group=1, topk_group=1),
    "qwen2_moe": Qwen2MoeConfig(
        **_GQA, intermediate_size=160, moe_intermediate_size=96, shared_expert_intermediate_size=96,
        num_experts=4, num_experts_per_tok=2,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        **_GQA, intermediate_size=160, moe_intermediate_size=96, num_experts=4, num_experts_per_tok=2, head_dim=48
    ),
    "mixtral": MixtralConfig(**_GQA, intermediate_size=160, num_local_experts=4, num_experts_per_tok=2),
    "olmoe": OlmoeConfig(**_GQA, intermediate_size=96, num_experts=4, num_experts_per_tok=2),
    "granitemoe": GraniteMoeConfig(**_GQA, intermediate_size=96, num_local_experts=4, num_experts_per_tok=2),
}  # fmt: skip


def write_float(directory: Path, config: PretrainedConfig, *, shard: str = "5GB") -> torch.nn.Module:
    """A random model of `config`, saved the way Hugging Face saves it, with tiny's tokenizer beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    model.save_pretrained(directory, max_shard_size=shard)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(TINY / name, directory / name)
    return model


@pytest.mark.parametrize("name", CONFIGS)
def test_every_architecture_survives_quantisation(name: str, tmp_path: Path) -> None:
    """int8 logits stay within 5 % of float32's; the quantised layers shrink to at most 0.28 (short groups).

    Every token goes to every expert: near-ties of a random router would flip and hide the error that is sought.
    """
    config = copy.deepcopy(CONFIGS[name])
    config.num_experts_per_tok = 4
    model = write_float(tmp_path / "float", config)
    report = quantise_directory(tmp_path / "float", tmp_path / "int8")
    assert report.quantised_after / report.quantised_before < 0.28
    ids = torch.randint(3, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        wanted = model(ids).logits
        quantised = load_model(tmp_path / "int8", "cpu").module(ids).logits
        plain = load_model(tmp_path / "float", "cpu").module(ids).logits
    assert torch.allclose(plain, wanted, atol=1e-5)
    error = (quantised - wanted).norm() / wanted.norm()
    assert 0 < error < 0.05


def test_sharded_checkpoints_are_read(tmp_path: Path) -> None:
    """A checkpoint in several files gives the same int8 weights as the same one in a single file."""
    write_float(tmp_path / "one", CONFIGS["qwen3_moe"])
    write_float(tmp_path / "many", CONFIGS["qwen3_moe"], shard="200KB")
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 1
    quantise_directory(tmp_path / "one", tmp_path / "q1")
    quantise_directory(tmp_path / "many", tmp_path / "q2")
    assert directory_digest(tmp_path / "q1") == directory_digest(tmp_path / "q2")


@given(
    rows=st.integers(1, 5), columns=st.integers(1, 300), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**31 - 1)
)
def test_rounding_error_is_at_most_half_a_step(rows: int, columns: int, bits: int, seed: int) -> None:
    """Every weight comes back within half a quantisation step, whatever the width; zeros stay zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    qweight, scale = quantise_tensor(weight, 128, bits)
    back = dequantise(qweight, scale, 128, torch.float32)
    step = scale.repeat_interleave(128, dim=-1)[..., :columns]
    assert ((back - weight).abs() <= step / 2 + 1e-6).all()
    assert (back[0] == 0).all()


def test_backward_is_the_gradient_of_the_dequantised_layer() -> None:
    """The input gradients of both int8 layers equal those of float layers with the dequantised weights."""
    torch.manual_seed(0)
    linear = QuantLinear.from_linear(torch.nn.Linear(200, 30))
    x = torch.randn(7, 200, dtype=torch.float32, requires_grad=True)
    linear(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    weight = dequantise(linear.qweight, linear.scale, 128, torch.float32)
    torch.nn.functional.linear(y, weight, linear.bias).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-5)

    experts = QuantExperts.from_fused(torch.randn(4, 24, 40), torch.randn(4, 40, 12), torch.nn.functional.silu)
    index = torch.tensor([[0, 1], [0, 3], [0, 1]])  # expert 2 gets nothing
    weights = torch.rand(3, 2)
    x = torch.randn(3, 40, requires_grad=True)
    experts(x, index, weights).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    gate_up = dequantise(experts.gate_up_proj_qweight, experts.gate_up_proj_scale, 128, torch.float32)
    down = dequantise(experts.down_proj_qweight, experts.down_proj_scale, 128, torch.float32)
    rows = []
    for token in range(3):
        total = torch.zeros(40)
        for slot in range(2):
            gate, up = (gate_up[index[token, slot]] @ y[token]).chunk(2)
            total = total + weights[token, slot] * (down[index[token, slot]] @ (torch.nn.functional.silu(gate) * up))
        rows.append(total)
    torch.stack(rows).square().sum().backward()
    assert torch.allclose(x.grad, y.grad, rtol=1e-4, atol=1e-4)


def test_quantising_never_holds_the_model_whole(tmp_path: Path) -> None:
    """The peak memory of quantising grows by far less than the float model's size."""
    config = Qwen3MoeConfig(
        **{**_GQA, "hidden_size": 512, "num_hidden_layers": 6}, intermediate_size=256, moe_intermediate_size=512,
        num_experts=24, num_experts_per_tok=2, head_dim=128,
    )  # fmt: skip
    write_float(tmp_path / "float", config, shard="50MB")
    size = sum(path.stat().st_size for path in (tmp_path / "float").glob("*.safetensors"))
    code = (
        "import resource, sys; from pathlib import Path\n"
        "import fl_client.model.quantise as q; q.SHARD_BYTES = 20 << 20\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "q.quantise_directory(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "float"), str(tmp_path / "int8")],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert size > 400e6
    assert int(done.stdout.split()[-1]) < size / 2


@pytest.mark.parametrize("damage", ["config", "architecture", "weights", "truncated", "tensor", "pickle"])
def test_broken_directories_are_refused_by_name(damage: str, tmp_path: Path) -> None:
    """A directory with one thing wrong gets a ModelError with a fix, never another exception."""
    broken = tmp_path / "broken"
    shutil.copytree(TINY, broken)
    weights = broken / "model.safetensors"
    if damage == "config":
        (broken / "config.json").write_text("{", encoding="utf-8")
    elif damage == "architecture":
        (broken / "config.json").write_text(json.dumps({"model_type": "gpt2"}), encoding="utf-8")
    elif damage == "weights":
        weights.unlink()
    elif damage == "truncated":
        weights.write_bytes(weights.read_bytes()[:-1000])
    elif damage == "tensor":
        config = json.loads((broken / "config.json").read_text(encoding="utf-8"))
        config["n_routed_experts"] = 8
        (broken / "config.json").write_text(json.dumps(config), encoding="utf-8")
    else:
        weights.rename(broken / "pytorch_model.bin")
    with pytest.raises(ModelError) as caught:
        load_model(broken, "cpu")
    assert caught.value.fix


def test_the_shipped_base_is_what_its_report_says() -> None:
    """tiny: a few megabytes, balanced experts, and a probe above the goal."""
    facts = inspect_directory(TINY)
    report = json.loads((TINY / "report.json").read_text(encoding="utf-8"))
    assert facts.quantised
    assert (facts.routed_experts, facts.experts_per_token) == (16, 2)
    assert facts.bytes_on_disk < 12e6
    assert facts.quantised_layers_bytes / facts.quantised_layers_float32_bytes < 0.27
    assert min(min(layer) for layer in report["expert_load_over_even_share"]) >= 0.25
    assert report["probe_accuracy"] >= 0.45
