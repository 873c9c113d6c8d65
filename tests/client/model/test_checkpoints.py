"""Quantised releases: float8 with block scales is read for what it stands for, every other form is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from fl_client.model.inspect import inspect_directory
from fl_client.model.load import load_model
from fl_client.model.quantise import quantise_directory
from fl_shared.errors import ModelError
from helpers.checkpoints import Tensors, altered

Make = Callable[[str], tuple[PreTrainedModel, Path]]
IDS = torch.tensor([[5, 300, 17, 4, 260, 99]])


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
    for use in (
        lambda: quantise_directory(bad, tmp_path / "out"),
        lambda: load_model(bad, "cpu"),
        lambda: inspect_directory(bad),
    ):
        with pytest.raises(ModelError, match="already quantised") as caught:
            use()
        assert "float release" in caught.value.fix
        assert not said or method in caught.value.message
    assert not (tmp_path / "out").exists()


FORMS: dict[str, tuple[str, dict[str, Tensor]]] = {  # what stands for a matrix `x.weight`, by who writes it
    "HQQ": ("HQQ", {"W_q": torch.zeros(8, 8, dtype=torch.uint8), "zero": torch.zeros(8), "scale": torch.zeros(8)}),
    "AQLM": ("AQLM", {"codes": torch.zeros(8, dtype=torch.int16), "codebooks": torch.ones(1), "scales": torch.ones(1)}),
    "QuIP#": ("QuIP#", {"Qidxs": torch.zeros(8, 8, dtype=torch.int64), "SU": torch.ones(8), "SV": torch.ones(8)}),
    "VPTQ": ("VPTQ", {"indices": torch.zeros(8, dtype=torch.int32), "centroids.weight": torch.ones(8)}),
    "EXL2": ("EXL2", {"q_weight": torch.zeros(8, dtype=torch.int32), "q_invperm": torch.zeros(8, dtype=torch.int32)}),
    "EXL3": ("EXL3", {"trellis": torch.zeros(8, dtype=torch.int16), "suh": torch.ones(8), "svh": torch.ones(8)}),
    "EETQ": ("EETQ", {"weight": torch.zeros(8, 8, dtype=torch.int8), "weight_scales": torch.ones(8)}),
    "NVFP4": (
        "ModelOpt",
        {"weight": torch.ones(8, 4, dtype=torch.uint8), "weight_scale": torch.ones(8), "weight_scale_2": torch.ones(1)},
    ),
    "MLX": ("MLX", {"weight": torch.zeros(8, dtype=torch.uint32), "scales": torch.ones(8), "biases": torch.ones(8)}),
    "Marlin": ("not known", {"B": torch.zeros(8, 8, dtype=torch.int32), "s": torch.ones(8)}),
    "floats and scales of their inputs": ("quanto", {"weight": torch.ones(8, 8), "input_scale": torch.ones(1)}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_a_matrix_in_any_other_form_is_refused_with_the_name_of_its_scheme(
    form: str, float_model: Make, tmp_path: Path
) -> None:
    """One such matrix among floats suffices, and no setting has to say so."""
    words, made = FORMS[form]
    place = "model.layers.1.self_attn.o_proj."

    def change(tensors: Tensors) -> Tensors:
        kept = tensors if form.startswith("floats") else {n: v for n, v in tensors.items() if place not in n}
        return kept | {place + name: value for name, value in made.items() if place + name not in kept}

    bad = altered(float_model("olmoe")[1], tmp_path / "bad", change)
    for use in (lambda: quantise_directory(bad, tmp_path / "out"), lambda: inspect_directory(bad)):
        with pytest.raises(ModelError, match="already quantised") as caught:
            use()
        assert words in caught.value.message
    assert not (tmp_path / "out").exists()


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
