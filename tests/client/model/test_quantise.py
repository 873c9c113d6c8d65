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
from fl_client.model.quantise import quantise_directory
from fl_client.model.quantised import matmul as quant_matmul
from fl_client.model.quantised.layers import QuantExperts, QuantLinear, dequantise, quantise_tensor
from fl_client.model.recipe.pretrain import train_tokenizer
from fl_shared.errors import ModelError

torch.set_num_threads(1)
VOCABULARY = 320
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
    """A random model of `config`, saved the way Hugging Face saves it, with a tokenizer of single bytes beside it."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.05)
    model.save_pretrained(directory, max_shard_size=shard)
    train_tokenizer(["a room"]).save_pretrained(directory)
    made: torch.nn.Module = model
    return made


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


@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 2**31 - 1))
def test_rounding_error_of_int8_is_at_most_half_a_step(rows: int, columns: int, seed: int) -> None:
    """Every weight comes back within half a quantisation step, whatever the width; zeros stay zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    qweight, scale = quantise_tensor(weight, 128)
    back = dequantise(qweight, scale, 128, torch.float32)
    step = scale.repeat_interleave(128, dim=-1)[..., :columns]
    assert ((back - weight).abs() <= step / 2 + 1e-6).all()
    assert (back[0] == 0).all()


@given(rows=st.integers(1, 5), columns=st.integers(1, 300), seed=st.integers(0, 2**31 - 1))
def test_int4_is_packed_and_no_worse_than_its_first_scale(rows: int, columns: int, seed: int) -> None:
    """Half a byte a weight; every group's error is at most that of the scale max/8; zeros stay zeros."""
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))
    weight[0] = 0
    qweight, scale = quantise_tensor(weight, 128, 4)
    whole, rest = divmod(columns, 128)
    assert qweight.dtype == torch.uint8
    assert qweight.shape == (rows, 64 * whole + (rest + 1) // 2)
    back = dequantise(qweight, scale, 128, torch.float32, columns)
    assert back.shape == weight.shape
    assert (back[0] == 0).all()
    for row in range(1, rows):
        for group, part in enumerate(weight[row].split(128)):
            step = -part[part.abs().argmax()] / 8
            simple = torch.round(part / step).clamp(-8, 7) * step
            found = back[row, 128 * group : 128 * group + len(part)]
            assert (found - part).square().sum() <= (simple - part).square().sum() * (1 + 1e-5)


@pytest.mark.parametrize("block", [1 << 20, 3000], ids=["one block", "many blocks"])
@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("inputs", [1, 65, 128, 200, 576, 577])
def test_products_equal_those_of_the_dequantised_weight(
    bits: int, inputs: int, block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """x W^T and g W of a matrix and of experts, two of them without rows, whatever the width and the block."""
    monkeypatch.setattr(quant_matmul, "BLOCK", block)
    torch.manual_seed(0)
    qweight, scale = quantise_tensor(torch.randn(5, 33, inputs), 128, bits)
    weight = dequantise(qweight, scale, 128, torch.float32, inputs)
    x, g, ends = torch.randn(11, inputs), torch.randn(11, 33), torch.tensor([4, 4, 9, 9, 11], dtype=torch.int32)
    rows = ((0, slice(0, 4)), (2, slice(4, 9)), (4, slice(9, 11)))

    def same(found: torch.Tensor, wanted: torch.Tensor) -> bool:
        return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)

    one = (qweight[1], scale[1], 128, inputs)
    assert same(quant_matmul.matmul(x, *one), x @ weight[1].mT)
    assert same(quant_matmul.matmul_transposed(g, *one), g @ weight[1])
    all_five = (qweight, scale, ends, 128, inputs)
    assert same(quant_matmul.grouped(x, *all_five), torch.cat([x[r] @ weight[e].mT for e, r in rows]))
    assert same(quant_matmul.grouped_transposed(g, *all_five), torch.cat([g[r] @ weight[e] for e, r in rows]))
    nothing = torch.zeros(5, dtype=torch.int32)
    assert quant_matmul.grouped(x[:0], qweight, scale, nothing, 128, inputs).shape == (0, 33)


@pytest.mark.parametrize("bits", [8, 4])
def test_backward_is_the_gradient_of_the_dequantised_layer(bits: int) -> None:
    """The input gradients of both quantised layers equal those of float layers with the dequantised weights."""
    torch.manual_seed(0)
    linear = QuantLinear.from_linear(torch.nn.Linear(201, 30), bits=bits)
    x = torch.randn(7, 201, requires_grad=True)
    linear(x).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    torch.nn.functional.linear(y, linear.weight_as(torch.float32), linear.bias).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
    assert torch.allclose(x.grad, y.grad, rtol=1e-5, atol=1e-5)

    act = torch.nn.functional.silu
    experts = QuantExperts.from_fused(torch.randn(4, 26, 41), torch.randn(4, 41, 13), act, bits=bits)
    index = torch.tensor([[0, 1], [0, 3], [0, 1]])  # expert 2 gets nothing
    weights = torch.rand(3, 2)
    x = torch.randn(3, 41, requires_grad=True)
    experts(x, index, weights).square().sum().backward()
    y = x.detach().clone().requires_grad_()
    gate_up, down = (experts.weight_as(name, torch.float32) for name in ("gate_up_proj", "down_proj"))
    rows = []
    for token in range(3):
        total = torch.zeros(41)
        for slot in range(2):
            gate, up = (gate_up[index[token, slot]] @ y[token]).chunk(2)
            total = total + weights[token, slot] * (down[index[token, slot]] @ (act(gate) * up))
        rows.append(total)
    torch.stack(rows).square().sum().backward()
    assert x.grad is not None
    assert y.grad is not None
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
