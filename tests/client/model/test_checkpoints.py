"""Model directories that are not what they seem: read rightly, or refused by name with nothing left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

from fl_client.model.inspect import inspect_directory
from fl_client.model.load import load_model
from fl_client.model.quantise import quantise_directory
from fl_shared.errors import ModelError

Make = Callable[[str], tuple[PreTrainedModel, Path]]
Tensors = dict[str, Tensor]
IDS = torch.tensor([[5, 300, 17, 4, 260, 99]])


def altered(good: Path, target: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    """A copy of a directory with other tensors and other fields in config.json (None takes a field out)."""
    shutil.copytree(good, target)
    save_file(
        {name: value.contiguous() for name, value in change(load_file(good / "model.safetensors")).items()},
        target / "model.safetensors",
    )
    path = target / "config.json"
    fields = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return target


def is_matrix(name: str, value: Tensor) -> bool:
    """Whether releases quantise this tensor: attention, MLPs, experts."""
    kept = ("embed", "lm_head", "norm", "mlp.gate.", "router", "shared_expert_gate", "bias")
    return value.ndim >= 2 and not any(word in name for word in kept)


BLOCK = (48, 32)


def blocks_of(value: Tensor, block: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
    """(float8 values, a scale per block, the float32 values they stand for), block by block, for a matrix."""
    rows, columns = value.shape
    scales = torch.zeros(-(-rows // block[0]), -(-columns // block[1]))
    stored, meant = torch.zeros_like(value, dtype=torch.float8_e4m3fn), torch.zeros_like(value)
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            part = (slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1]))
            scales[i, j] = value[part].abs().max() / 448
            stored[part] = (value[part] / scales[i, j]).to(torch.float8_e4m3fn)
            meant[part] = stored[part].float() * scales[i, j]
    return stored, scales, meant


def in_float8(tensors: Tensors, block: tuple[int, int] = BLOCK) -> tuple[Tensors, Tensors]:
    """The tensors as a float8 release holds them, and what they stand for, found block by block."""
    stored, meant = dict(tensors), dict(tensors)
    for name, value in tensors.items():
        if not is_matrix(name, value):
            continue
        if value.ndim == 2:
            stored[name], stored[f"{name}_scale_inv"], meant[name] = blocks_of(value, block)
        else:
            made = [blocks_of(each, block) for each in value]
            stacked = (torch.stack(each) for each in zip(*made, strict=True))
            stored[name], stored[f"{name}_scale_inv"], meant[name] = stacked
    return stored, meant


FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic", "fmt": "e4m3"}


@pytest.mark.parametrize("fused", [False, True], ids=["an expert each", "fused"])
@pytest.mark.parametrize("family", ["deepseek_v3", "qwen3_moe"])
def test_float8_with_block_scales_is_the_model_that_it_stands_for(
    family: str, fused: bool, float_model: Make, tmp_path: Path
) -> None:
    """Quantising the float8 release gives bit for bit what quantising its float values gives; sizes fit no block."""
    model, good = float_model(family)

    def source(tensors: Tensors) -> Tensors:
        if not fused:
            return tensors
        state = {name: value.clone() for name, value in model.state_dict().items()}
        return {name: value for name, value in state.items() if name in tensors or "experts." in name}

    eight = altered(good, tmp_path / "eight", lambda t: in_float8(source(t))[0], quantization_config=FP8)
    altered(good, tmp_path / "meant", lambda t: in_float8(source(t))[1])
    quantise_directory(eight, tmp_path / "a")
    quantise_directory(tmp_path / "meant", tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    assert (tmp_path / "a/config.json").read_bytes() == (tmp_path / "b/config.json").read_bytes()
    assert any("float8" in str(value.dtype) for value in load_file(eight / "model.safetensors").values())
    assert inspect_directory(eight).bytes_on_disk == sum(
        value.numel() * value.element_size() for value in load_file(eight / "model.safetensors").values()
    )
    load_model(tmp_path / "a", "cpu")
    with pytest.raises(ModelError, match="float8") as caught:
        load_model(eight, "cpu")
    assert "fl-model quantize" in caught.value.fix


def test_float8_with_one_scale_a_tensor_and_with_power_of_two_scales(float_model: Make, tmp_path: Path) -> None:
    """Both are products of two floats, too."""
    _, good = float_model("qwen3_moe")

    def one(tensors: Tensors, *, meant: bool) -> Tensors:
        made = dict(tensors)
        for name, value in tensors.items():
            if is_matrix(name, value):
                eight = (value / 0.01).to(torch.float8_e4m3fn)
                made[name] = eight.float() * 0.01 if meant else eight
                if not meant:
                    made[f"{name}_scale_inv"] = torch.tensor([0.01])
        return made

    whole = {**FP8, "weight_block_size": None}
    altered(good, tmp_path / "one", lambda t: one(t, meant=False), quantization_config=whole)
    altered(good, tmp_path / "two", lambda t: one(t, meant=True))
    quantise_directory(tmp_path / "one", tmp_path / "a")
    quantise_directory(tmp_path / "two", tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()

    def powers(tensors: Tensors, *, meant: bool) -> Tensors:
        made = in_float8(tensors)[0]
        for name in [name for name in made if name.endswith("_scale_inv")]:
            scale = torch.exp2(torch.ceil(torch.log2(made[name])))
            made[name] = scale.to(torch.float8_e8m0fnu)
            if meant:
                weight = name.removesuffix("_scale_inv")
                value, found = made[weight].float(), made.pop(name).float()
                for i in range(found.shape[0]):
                    for j in range(found.shape[1]):
                        value[BLOCK[0] * i : BLOCK[0] * (i + 1), BLOCK[1] * j : BLOCK[1] * (j + 1)] *= found[i, j]
                made[weight] = value
        return made

    altered(good, tmp_path / "e8m0", lambda t: powers(t, meant=False), quantization_config=FP8)
    altered(good, tmp_path / "float", lambda t: powers(t, meant=True))
    quantise_directory(tmp_path / "e8m0", tmp_path / "c")
    quantise_directory(tmp_path / "float", tmp_path / "d")
    assert (tmp_path / "c/model.safetensors").read_bytes() == (tmp_path / "d/model.safetensors").read_bytes()


def _first_scale(tensors: Tensors, change: Callable[[Tensor], Tensor]) -> Tensors:
    stored = in_float8(tensors)[0]
    name = next(each for each in stored if each.endswith("_scale_inv"))
    return {**stored, name: change(stored[name])}


FLOAT8_WRONG: dict[str, tuple[Callable[[Tensors], Tensors], object, str]] = {
    "no block size": (lambda t: in_float8(t)[0], {"quant_method": "fp8"}, "not one per block"),
    "no config": (lambda t: in_float8(t)[0], None, "not one per block"),
    "another block size": (lambda t: in_float8(t)[0], {**FP8, "weight_block_size": [128, 128]}, "not one per block"),
    "a block size of nothing": (lambda t: in_float8(t)[0], {**FP8, "weight_block_size": [0, 1]}, "not one per block"),
    "a scale too few": (lambda t: _first_scale(t, lambda s: s[:-1]), FP8, "not one per block"),
    "no scales": (
        lambda t: {n: v for n, v in in_float8(t)[0].items() if not n.endswith("_scale_inv")}, FP8, "stored as F8_E4M3",
    ),
    "a scale of NaN": (lambda t: _first_scale(t, lambda s: s * float("nan")), FP8, "NaN or infinity"),
    "scales of float weights": (lambda t: {**in_float8(t)[0], **in_float8(t)[1]}, FP8, "already quantised"),
}  # fmt: skip


@pytest.mark.parametrize("what", FLOAT8_WRONG)
def test_float8_that_cannot_be_read_for_sure_is_refused(what: str, float_model: Make, tmp_path: Path) -> None:
    """Missing, misshapen or broken scales, and a config that does not say the block: nothing is guessed."""
    change, settings, words = FLOAT8_WRONG[what]
    bad = altered(float_model("qwen3_moe")[1], tmp_path / "bad", change, quantization_config=settings)
    with pytest.raises(ModelError, match=words) as caught:
        quantise_directory(bad, tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()


def _each(tensors: Tensors, make: Callable[[str, Tensor], Tensors]) -> Tensors:
    made: Tensors = {}
    for name, value in tensors.items():
        made |= make(name, value) if is_matrix(name, value) else {name: value}
    return made


def _bnb8(name: str, value: Tensor) -> Tensors:
    scale = value.abs().amax(1)
    whole = torch.round(value / scale[:, None] * 127).to(torch.int8)
    return {name: whole, name.replace(".weight", ".SCB"): scale, f"{name}_format": torch.tensor(0, dtype=torch.uint8)}


def _nf4(name: str, value: Tensor) -> Tensors:
    return {
        name: torch.zeros(-(-value.numel() // 2), 1, dtype=torch.uint8),
        f"{name}.absmax": torch.zeros(-(-value.numel() // 64), dtype=torch.uint8),
        f"{name}.quant_map": torch.zeros(16),
        f"{name}.quant_state.bitsandbytes__nf4": torch.zeros(90, dtype=torch.uint8),
    }


def _packed(name: str, value: Tensor) -> Tensors:
    rows, columns = value.shape
    return {
        f"{name}_packed": torch.zeros(rows, -(-columns // 8), dtype=torch.int32),
        f"{name}_scale": torch.ones(rows, 1, dtype=torch.bfloat16),
        f"{name}_shape": torch.tensor([rows, columns]),
    }


def _gptq(name: str, value: Tensor) -> Tensors:
    rows, columns = value.shape
    stem = name.removesuffix("weight")
    return {
        f"{stem}qweight": torch.zeros(-(-columns // 8), rows, dtype=torch.int32),
        f"{stem}qzeros": torch.zeros(1, -(-rows // 8), dtype=torch.int32),
        f"{stem}scales": torch.ones(1, rows, dtype=torch.float16),
        f"{stem}g_idx": torch.zeros(columns, dtype=torch.int32),
    }


SCHEMES: dict[str, tuple[str, Callable[[str, Tensor], Tensors]]] = {
    "bitsandbytes int8": ("bitsandbytes", _bnb8),
    "bitsandbytes nf4": ("bitsandbytes", _nf4),
    "compressed-tensors int8": (
        "compressed-tensors", lambda n, v: {n: v.to(torch.int8), f"{n}_scale": torch.ones(v.shape[0], 1)},
    ),
    "compressed-tensors packed": ("compressed-tensors", _packed),
    "compressed-tensors float8": (
        "compressed-tensors", lambda n, v: {n: v.to(torch.float8_e4m3fn), f"{n}_scale": torch.ones(v.shape[0], 1)},
    ),
    "a float with a scale": ("compressed-tensors", lambda n, v: {n: v, f"{n}_scale": torch.ones(v.shape[0], 1)}),
    "gptq": ("gptq", _gptq),
    "awq": ("awq", lambda n, v: {k: t for k, t in _gptq(n, v).items() if not k.endswith("g_idx")}),
    "torchao": ("torchao", lambda n, v: {f"{n}:_data": v.to(torch.int8), f"{n}:_scale": torch.ones(v.shape[0])}),
    "mxfp4": (
        "mxfp4",
        lambda n, v: {
            f"{n}_blocks": torch.zeros(v.shape[0], 2, 16, dtype=torch.uint8),
            f"{n}_scales": torch.zeros(v.shape[0], 2, dtype=torch.uint8),
        },
    ),
    "bare integers": ("something", lambda n, v: {n: v.to(torch.int8)}),
    "float8 of another kind": ("fp8", lambda n, v: {n: v.to(torch.float8_e5m2), f"{n}_scale_inv": torch.ones(1)}),
}  # fmt: skip


@pytest.mark.parametrize("said", [True, False], ids=["as config.json says", "config.json says nothing"])
@pytest.mark.parametrize("what", SCHEMES)
def test_a_model_that_is_already_quantised_is_refused_by_name(
    what: str, said: bool, float_model: Make, tmp_path: Path
) -> None:
    """Names and types of the tensors tell, whatever config.json says; neither quantising nor loading drops a scale."""
    method, make = SCHEMES[what]
    settings = {"quant_method": method} if said else None
    bad = altered(float_model("qwen3_moe")[1], tmp_path / "bad", lambda t: _each(t, make), quantization_config=settings)
    for use in (lambda: quantise_directory(bad, tmp_path / "out"), lambda: load_model(bad, "cpu")):
        with pytest.raises(ModelError, match="already quantised") as caught:
            use()
        assert "float release" in caught.value.fix
        assert not said or method in caught.value.message
    assert not (tmp_path / "out").exists()
    assert inspect_directory(bad).bytes_on_disk > 0


def test_a_config_that_claims_a_quantisation_of_float_weights_is_not_believed(
    float_model: Make, tmp_path: Path
) -> None:
    """The cast of a float8 release to bfloat16 keeps `quantization_config`: the weights are float and are used."""
    _, good = float_model("deepseek_v3")
    cast = altered(good, tmp_path / "cast", lambda t: t, quantization_config=FP8)
    quantise_directory(good, tmp_path / "a")
    quantise_directory(cast, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    with torch.no_grad():
        assert torch.equal(load_model(cast, "cpu").module(IDS).logits, load_model(good, "cpu").module(IDS).logits)


def _other_kind(kind: str, good: Path, target: Path) -> Path:
    shutil.copytree(good, target)
    weights, config = target / "model.safetensors", target / "config.json"
    index = target / "model.safetensors.index.json"
    names = list(load_file(weights))
    if kind == "an adapter":
        (target / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        weights.rename(target / "adapter_model.safetensors")
    elif kind == "gguf":
        config.unlink()
        weights.rename(target / "model-q4_k_m.gguf")
    elif kind == "gguf beside a config":
        weights.rename(target / "model-q4_k_m.gguf")
    elif kind == "pickle":
        weights.rename(target / "pytorch_model.bin")
    elif kind == "a missing shard":
        weights.rename(target / "model-00001-of-00002.safetensors")
        there = dict.fromkeys(names, "model-00001-of-00002.safetensors")
        index.write_text(json.dumps({"weight_map": {**there, names[0]: "model-00002-of-00002.safetensors"}}))
    elif kind == "an index out of the folder":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../model.safetensors")}))
    elif kind == "a broken index":
        index.write_text("[]")
    elif kind == "two sets of weights":
        shutil.copyfile(weights, target / "model-00001-of-00001.safetensors")
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    elif kind == "a tensor twice":
        weights.rename(target / "a.safetensors")
        shutil.copyfile(target / "a.safetensors", target / "b.safetensors")
    elif kind == "a dangling link":
        weights.unlink()
        weights.symlink_to(target / "gone")
    elif kind == "a truncated file":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "a page of HTML":
        weights.write_bytes(b"<html>429 too many requests</html>")
    elif kind == "no tokenizer":
        (target / "tokenizer.json").unlink()
        (target / "tokenizer_config.json").unlink()
    elif kind == "a broken tokenizer":
        (target / "tokenizer.json").write_text("{}")
    elif kind == "a slow tokenizer":
        (target / "tokenizer.json").unlink()
        (target / "tokenizer.model").write_bytes(b"\x00not sentencepiece")
    return target


KINDS = {
    "an adapter": "LoRA adapter", "gguf": "GGUF", "gguf beside a config": "model-q4_k_m.gguf",
    "pickle": "pytorch_model.bin", "a missing shard": "model-00002-of-00002.safetensors, which is missing",
    "an index out of the folder": "no index of weights", "a broken index": "no index of weights",
    "two sets of weights": "holds both", "a tensor twice": "both hold", "a dangling link": "safetensors",
    "a truncated file": "safetensors", "a page of HTML": "safetensors", "no tokenizer": "no tokenizer",
    "a broken tokenizer": "tokenizer.json is broken", "a slow tokenizer": "tokenizer.model is a slow tokenizer",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_directories_are_refused_by_name(kind: str, float_model: Make, tmp_path: Path) -> None:
    """Before anything is made: the message names what was found, and says the next step."""
    bad = _other_kind(kind, float_model("mixtral")[1], tmp_path / "bad")
    with pytest.raises(ModelError, match=KINDS[kind]) as caught:
        quantise_directory(bad, tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError) as caught:
        load_model(bad, "cpu")
    assert caught.value.fix


CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a bias that config.json denies": (
        lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(200)},
        "has no model.layers.0.self_attn.q_proj.bias",
    ),
    "integers for embeddings": (
        lambda t: {**t, "model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.int32)},
        "embed_tokens.weight is stored as I32",
    ),
    "a missing matrix": (
        lambda t: {n: v for n, v in t.items() if "layers.1.self_attn.q_proj" not in n},
        "lacks model.layers.1.self_attn.q_proj",
    ),
    "an expert beyond all bounds": (
        lambda t: {**t, "model.layers.0.mlp.experts.99999999999999.gate_proj.weight": torch.ones(1)},
        "has no model.layers.0",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_of_another_model_are_refused_when_quantised_and_when_loaded(
    what: str, float_model: Make, tmp_path: Path
) -> None:
    """Nothing is dropped, and nothing is filled with random numbers as transformers would."""
    change, words = CHANGES[what]
    bad = altered(float_model("mixtral")[1], tmp_path / "bad", change)
    for use in (lambda: quantise_directory(bad, tmp_path / "out"), lambda: load_model(bad, "cpu")):
        with pytest.raises(ModelError, match=words):
            use()
    assert not (tmp_path / "out").exists()


def test_what_releases_hold_beside_the_model_is_left_out(float_model: Make, tmp_path: Path) -> None:
    """A multi-token layer past the last one and rotary frequencies; mixed float types are kept as they are."""
    _, good = float_model("deepseek_v3")

    def more(tensors: Tensors) -> Tensors:
        made = {n: v.to(torch.bfloat16) if "norm" in n else v for n, v in tensors.items()}
        extra = {
            "model.layers.2.eh_proj.weight": torch.ones(2, 2),
            "model.layers.2.mlp.experts.0.gate_proj.weight": torch.ones(2, 2),
            "model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(2, 2),
            "model.layers.2.mlp.experts.0.down_proj.weight": torch.ones(2, 2),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        }
        return {**made, **extra}

    report = quantise_directory(altered(good, tmp_path / "more", more), tmp_path / "q")
    assert 0 < report.bytes_before < (good / "model.safetensors").stat().st_size
    load_model(tmp_path / "q", "cpu")


def test_tied_embeddings(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A tied head may be stored as well, when it is the embeddings; a family's own default for tying is followed."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    stored = altered(
        tmp_path / "tied", tmp_path / "twice", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    other = altered(
        tmp_path / "tied", tmp_path / "other", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}
    )
    quantise_directory(tmp_path / "tied", tmp_path / "a")
    quantise_directory(stored, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    for name in ("a", "b", "twice"):
        loaded = load_model(tmp_path / name, "cpu").module
        assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from the embeddings"):
        quantise_directory(other, tmp_path / "c")


def test_a_cache_of_linked_blobs_is_read(float_model: Make, tmp_path: Path) -> None:
    """As Hugging Face's cache keeps a release: every file a link to a blob named by its digest."""
    _, good = float_model("olmoe")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted(good.iterdir())):
        shutil.copyfile(path, tmp_path / f"blobs/{number:064x}")
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number:064x}")
    quantise_directory(good, tmp_path / "a")
    quantise_directory(tmp_path / "snapshot", tmp_path / "b")
    assert inspect_directory(tmp_path / "a").digest == inspect_directory(tmp_path / "b").digest
    assert not any(path.is_symlink() for path in (tmp_path / "b").iterdir())


def test_a_slow_tokenizer_is_converted_where_transformers_can(
    tokenizer: PreTrainedTokenizerFast, float_model: Make, tmp_path: Path
) -> None:
    """vocab.json and merges.txt alone: the quantised directory has a tokenizer.json that gives the same ids."""
    _, good = float_model("olmoe")
    slow = tmp_path / "slow"
    shutil.copytree(good, slow)
    model = json.loads((slow / "tokenizer.json").read_text())["model"]
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (slow / "vocab.json").write_text(json.dumps(model["vocab"]))
    (slow / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (slow / "tokenizer.json").unlink()
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    quantise_directory(slow, tmp_path / "q")
    assert (tmp_path / "q/tokenizer.json").is_file()
    made = load_model(tmp_path / "q", "cpu").tokenizer
    text = "cholera due to a room"
    assert made(text)["input_ids"]
    assert set(made(text)["input_ids"]) <= set(range(320))
    assert made.decode(made(text)["input_ids"]).strip() == text


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_quantised(
    float_model: Make, tmp_path: Path
) -> None:
    """More ids than the embeddings have rows."""
    bad = tmp_path / "bad"
    shutil.copytree(float_model("olmoe")[1], bad)
    made = PreTrainedTokenizerFast.from_pretrained(bad)
    made.add_tokens([f"word{n}" for n in range(400)])
    made.save_pretrained(bad)
    with pytest.raises(ModelError, match="the tokenizer knows"):
        quantise_directory(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_QUANTISE = """
import resource, sys
from pathlib import Path
import fl_client.model.quantise as q
q.SHARD_BYTES = 100_000
if sys.argv[3] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def slow(done, total):
    if sys.argv[3] == "killed" and done > total // 2:
        print("half", flush=True)
        import time; time.sleep(60)
from fl_shared.errors import ModelError
try:
    q.quantise_directory(Path(sys.argv[1]), Path(sys.argv[2]), progress=slow)
except ModelError as error:
    print("refused:", error.message, "|", error.fix)
"""


def test_a_full_disk_leaves_nothing_and_a_killed_quantiser_no_model(float_model: Make, tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk; after kill -9 the half-written folder has no config.json."""
    _, good = float_model("qwen2_moe")
    line = [sys.executable, "-c", _QUANTISE, str(good)]
    done = subprocess.run([*line, str(tmp_path / "full"), "full"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused:"), done.stderr
    assert "make room" in done.stdout
    assert not (tmp_path / "full").exists()
    with subprocess.Popen([*line, str(tmp_path / "killed"), "killed"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "half"
        process.kill()
    assert any((tmp_path / "killed").iterdir())
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load_model(tmp_path / "killed", "cpu")


def test_a_copy_that_lost_a_shard_is_no_model(
    float_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantised directory in several shards, each taken away or cut short in turn."""
    monkeypatch.setattr("fl_client.model.quantise.SHARD_BYTES", 200_000)
    _, good = float_model("qwen2_moe")
    quantise_directory(good, tmp_path / "q")
    load_model(tmp_path / "q", "cpu")
    shards = sorted((tmp_path / "q").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in (shards[0], shards[-1]):
        content = shard.read_bytes()
        shard.unlink()
        with pytest.raises(ModelError, match=shard.name):
            load_model(tmp_path / "q", "cpu")
        shard.write_bytes(content[:-1])
        with pytest.raises(ModelError, match=shard.name):
            load_model(tmp_path / "q", "cpu")
        shard.write_bytes(content)
    load_model(tmp_path / "q", "cpu")
