"""`fl-model` as a person runs it: figures, JSON, exit codes, and no traceback for bad input."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import pytest
from safetensors.torch import load_file
from transformers import PreTrainedModel

from fl_client.cli import model as command
from fl_client.model.inspect import inspect_directory
from fl_client.model.quantise import quantise_directory

Make = Callable[[str], tuple[PreTrainedModel, Path]]


class Done(NamedTuple):
    """What a command left behind."""

    returncode: int
    stdout: str
    stderr: str


FlModel = Callable[..., Done]


@pytest.fixture
def fl_model(capsys: pytest.CaptureFixture[str]) -> FlModel:
    """Run the command's own entry in this process (importing torch anew for each costs seconds)."""

    def run(*arguments: str | Path) -> Done:
        capsys.readouterr()
        try:
            code = command.main([str(each) for each in arguments])
        except SystemExit as left:  # argparse
            code = int(left.code or 0)
        shown = capsys.readouterr()
        return Done(code, shown.out, shown.err)

    return run


def test_active_parameters_are_those_one_token_meets(architecture: str, float_model: Make) -> None:
    """Everything but the routed experts counts whole; of those, top-k of E. The same before and after int8."""
    model, directory = float_model(architecture)
    facts = inspect_directory(directory)
    routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
    total = sum(p.numel() for p in model.parameters())
    assert routed
    assert facts.parameters == total
    assert facts.active_parameters == total - routed // 2  # 2 of 4 experts
    assert facts.active_share == round(facts.active_parameters / total, 4)
    assert (facts.routed_experts, facts.experts_per_token, facts.quantised) == (4, 2, False)
    assert facts.bytes_float32 == 4 * total


def test_inspecting_needs_no_weights_in_memory_and_counts_bytes(float_model: Make, tmp_path: Path) -> None:
    """Bytes on disk are those of all tensors; the int8 part is counted apart and is under 0.28 of float32."""
    _, directory = float_model("deepseek_v3")
    quantise_directory(directory, tmp_path / "q")
    facts = inspect_directory(tmp_path / "q")
    tensors = load_file(tmp_path / "q/model.safetensors")
    assert facts.bytes_on_disk == sum(t.numel() * t.element_size() for t in tensors.values())
    parts = [t for name, t in tensors.items() if name.endswith(("qweight", "scale"))]
    assert facts.quantised_layers_bytes == sum(t.numel() * t.element_size() for t in parts)
    values = sum(t.numel() for name, t in tensors.items() if name.endswith("qweight"))
    assert facts.quantised_layers_float32_bytes == 4 * values
    assert facts.parameters == inspect_directory(directory).parameters
    assert facts.digest != inspect_directory(directory).digest


def test_quantize_then_inspect(fl_model: FlModel, float_model: Make, tmp_path: Path) -> None:
    """Both commands print the same digest; a second quantize into the same folder is refused with exit code 14."""
    _, directory = float_model("granitemoe")
    done = fl_model("quantize", directory, tmp_path / "q", "--json")
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout)
    assert 0.25 < made["quantised_layers_ratio"] < 0.28
    shown = json.loads(fl_model("inspect", tmp_path / "q", "--json").stdout)
    assert shown["digest"] == made["digest"]
    assert shown["digest"].startswith("sha256:")
    assert (shown["quantised"], shown["bits"]) == (True, 8)
    table = fl_model("inspect", tmp_path / "q")
    assert table.returncode == 0
    assert "active parameters" in table.stdout
    again = fl_model("quantize", directory, tmp_path / "q")
    assert again.returncode == 14
    assert "Traceback" not in again.stderr
    assert "fix:" in again.stderr


@pytest.mark.parametrize(
    ("arguments", "code", "words"),
    [
        (["inspect", "{}/nowhere"], 14, "nowhere"),
        (["inspect", "{}/file"], 14, "file"),
        (["quantize", "{}/nowhere", "{}/out"], 14, "nowhere"),
        (["quantize", "{}/model", "{}/out", "--bits", "5"], 2, "--bits"),
        (["build", "tiny", "--steps", "0"], 2, "--steps"),
        (["build", "tiny", "--steps", "many"], 2, "--steps"),
        (["build", "tiny", "--out", "{}/new", "--wordnet", "{}/nowhere"], 15, "nowhere"),
        (["build", "huge"], 2, "huge"),
        (["evaluate", "--spec", "{}/nowhere.toml", "--data", "{}/d.csv", "--adapter", "{}/a"], 2, "nowhere.toml"),
        (["export-adapter", "--spec", "{}/nowhere.toml", "--adapter", "{}/a", "{}/peft"], 2, "nowhere.toml"),
        ([], 2, "VERB"),
    ],
)
def test_bad_arguments_end_in_one_clear_line(
    arguments: list[str], code: int, words: str, tmp_path: Path, fl_model: FlModel, float_model: Make
) -> None:
    """Each wrong argument gives its exit code and is named; there is no traceback and nothing is written."""
    (tmp_path / "file").write_text("no directory", encoding="utf-8")
    (tmp_path / "model").symlink_to(float_model("olmoe")[1])
    before = sorted(tmp_path.iterdir())
    done = fl_model(*(each.replace("{}", str(tmp_path)) for each in arguments))
    assert done.returncode == code, done.stderr
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(tmp_path.iterdir()) == before


def test_the_console_script_is_a_real_process() -> None:
    """`python -m fl_client.cli.model --help` ends with commands that can be copied, without importing torch."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "fl_client.cli.model", "--help"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0
    assert "fl-model inspect tiny" in done.stdout
    assert " torch\n" not in done.stderr
