"""An exported adapter: stock PEFT loads it onto the float base, and there it computes what ours computes."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from safetensors.numpy import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.audit.canaries import worst_case_adapter
from fl_client.export.peft import write_peft
from fl_client.inference.predict import predict
from fl_client.model.layout import expert_modules, quantised_linears
from fl_client.model.load import TINY, load_model
from fl_client.tasks.classification import CrossEntropy
from fl_client.training.round import initial_adapter
from fl_shared.adapters.safetensors import pack
from fl_shared.documents.spec import LORA_TARGETS, LoraSection
from fl_shared.errors import ModelError
from helpers import warm
from helpers.random_models import ARCHITECTURES, adapted_small, float_model, small_config
from helpers.specs import run_spec, to_toml

torch.set_num_threads(1)
IDS = torch.randint(3, 96, (3, 9), generator=torch.Generator().manual_seed(5))
SHARED = ("deepseek_v2", "deepseek_v3", "qwen2_moe")
CASES: list[tuple[str, str | None]] = [(name, None) for name in ARCHITECTURES]
CASES += [(name, group) for name in ARCHITECTURES for group in ("attention", "routed_experts")]
CASES += [(name, "shared_experts") for name in SHARED]


def _write(adapted: AdaptedModel, directory: Path) -> None:
    values = {name: parameter.detach().numpy() for name, parameter in adapted.trainable.items()}
    write_peft(adapted, values, directory, head_metadata={"labels": list("abcde")}, digest="sha256:0")


def _logits(backbone: Any, head: Any, ids: Tensor = IDS) -> Tensor:
    """The language model's own logits over the adapted hidden states."""
    with torch.no_grad():
        hidden = backbone(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=False).last_hidden_state
        made: Tensor = head(hidden)
        return made


@pytest.mark.parametrize(("architecture", "group"), CASES)
def test_stock_peft_loads_every_family_and_gives_our_logits(
    architecture: str, group: str | None, tmp_path: Path
) -> None:
    """All targets together and each alone, onto the float base that Hugging Face makes: logits within 1e-4."""
    if group is None:
        adapted = adapted_small(architecture, quantised=False)
    else:
        module = float_model(small_config(architecture))
        mean, std = torch.zeros(136), torch.ones(136)
        adapted = adapt(module, LoraSection(rank=2, alpha=5.0, targets=(group,)), CrossEntropy(5), mean, std)
        worst_case_adapter(adapted, np.random.default_rng(0))
    _write(adapted, tmp_path / "peft")
    base: Any = float_model(small_config(architecture))
    before = _logits(base.model, base.lm_head)
    stock: Any = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    found = _logits(stock.base_model.model.model, base.lm_head)
    torch.testing.assert_close(found, _logits(adapted.module.backbone, base.lm_head), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, before, atol=1e-2), "the adapter moves the base"
    rows = sum(value.numel() for name, value in stock.named_parameters() if ".lora_" in name)
    assert rows == sum(value.size for value in load_file(tmp_path / "peft/adapter_model.safetensors").values())


def test_an_exported_core_loads_too(tmp_path: Path) -> None:
    """A run with cores (Fed-SB) is exported as plain LoRA that stock PEFT loads, shared and routed experts included."""
    adapted = adapted_small("deepseek_v3", quantised=False, core=True)
    _write(adapted, tmp_path / "peft")
    base: Any = float_model(small_config("deepseek_v3"))
    stock: Any = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    wanted = _logits(adapted.module.backbone, base.lm_head)
    torch.testing.assert_close(_logits(stock.base_model.model.model, base.lm_head), wanted, rtol=1e-4, atol=1e-4)


def test_what_stock_peft_refuses_is_not_left_behind(tmp_path: Path) -> None:
    """Shared experts as `target_modules`, which PEFT takes for routed ones, end in a named error and no folder."""
    adapted = adapted_small("deepseek_v2", quantised=False)
    groups = {name: "attention" if group == "shared_experts" else group for name, group in adapted.groups.items()}
    with pytest.raises(ModelError, match="stock PEFT does not load this adapter of a deepseek_v2 model") as caught:
        _write(dataclasses.replace(adapted, groups=groups), tmp_path / "peft")
    assert "lora_" in caught.value.message
    assert caught.value.fix
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_holds_files_or_is_none_is_left_alone(tmp_path: Path) -> None:
    """Both are refused by name."""
    adapted = adapted_small("mixtral", quantised=False)
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for name in ("full", "file"):
        with pytest.raises(ModelError, match=name):
            _write(adapted, tmp_path / name)
    assert (tmp_path / "full/mine").read_text() == "x"
    assert (tmp_path / "file").read_text() == "x"


def _float_tiny() -> Any:
    """The shipped base in float32, by transformers alone but for the values of its quantised layers."""
    quantised: Any = load_model(TINY, "cpu").module
    state = {name: value for name, value in quantised.state_dict().items() if not name.endswith(("qweight", "scale"))}
    made: Any = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(TINY)).eval()
    for name in quantised_linears(made):
        state[f"{name}.weight"] = quantised.get_submodule(name).weight_as(torch.float32)
    for name in expert_modules(made):
        for part in ("gate_up_proj", "down_proj"):
            state[f"{name}.{part}"] = quantised.get_submodule(name).weight_as(part, torch.float32)
    made.load_state_dict(state)
    return made


def test_the_command_exports_the_demos_base_and_says_what_it_does(tmp_path: Path) -> None:
    """The real command on `tiny` with all targets: PEFT loads the folder onto the float base; progress on stderr."""
    model = load_model(TINY, "cpu")
    spec = run_spec(base_model=model.digest, labels=["lungs", "heart"], rank=8, targets=LORA_TARGETS)
    rng = np.random.default_rng(0)
    offset = {
        name: rng.normal(0, 0.05, value.shape).astype(np.float32)
        for name, value in initial_adapter(model, spec).items()
    }
    (tmp_path / "adapter.safetensors").write_bytes(pack(offset))
    (tmp_path / "spec.toml").write_text(to_toml(spec.to_dict()))
    done = warm.run(
        "fl-model", "export-adapter", "--spec", "spec.toml", "--adapter", "adapter.safetensors",
        str(tmp_path / "peft"), "--json", env=os.environ, cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"directory": str(tmp_path / "peft")}
    base = _float_tiny()
    stock: Any = PeftModel.from_pretrained(base, tmp_path / "peft").eval()
    predict(model, offset, ["a cough"], spec)  # puts seeded start + offset into the model
    ours: Any = model.module
    wanted = _logits(ours.model, ours.lm_head)
    torch.testing.assert_close(_logits(stock.base_model.model.model, base.lm_head), wanted, rtol=1e-4, atol=1e-4)
