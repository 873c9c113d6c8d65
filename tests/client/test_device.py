"""The device is tried before a site is ready: what a round would find missing is a line with its fix."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from fl_client.agent.check import run_checks
from fl_client.model.load import TINY, load_model
from fl_client.training.device import CACHE, COMPILER, DRIVER, explain, try_device
from fl_shared.errors import ConfigError, EngineError
from helpers.agents import SITE, RealSite
from helpers.gateway import Gateway
from helpers.smallest import smallest_base

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed (pip install triton)")
CUDA = torch.device("cuda")


def rotary(directory: Path) -> None:
    """A base whose rotary frequencies follow the longest record of a batch."""
    config = json.loads((directory / "config.json").read_text())
    config["rope_parameters"] = {"rope_theta": 10000.0, "rope_type": "dynamic", "factor": 2.0}
    (directory / "config.json").write_text(json.dumps(config))


def damaged(directory: Path) -> None:
    """A base with one scale that is not a number."""
    (file,) = directory.glob("model*.safetensors")
    state = load_file(file)
    name = next(name for name in sorted(state) if name.endswith("scale"))
    state[name].view(-1)[0] = float("nan")
    save_file(state, file, metadata={"format": "pt"})


def broken_base(root: Path, breakage: object) -> Path:
    """A copy of the shipped base, broken."""
    directory = root / "base"
    shutil.copytree(TINY, directory)
    breakage(directory)  # type: ignore[operator]
    return directory


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway) -> Iterator[RealSite]:
    """An enrolled site with data; whatever agent is left is killed."""
    made = RealSite(tmp_path / "home", gateway)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.kill()


def use(site: RealSite, directory: Path) -> None:
    """Let the site train this base."""
    text = site.home.config.read_text()
    site.home.config.write_text(text.replace(str(smallest_base()), str(directory)))


def test_a_device_that_computes_is_a_line_of_the_check(site: RealSite) -> None:
    """`fl-client check` says device and type, and leaves the base as it was."""
    line = {result.name: result for result in run_checks(site.home, SITE)}["device"]
    assert line.ok
    assert line.message.startswith("cpu, float32: forward and backward")
    model = load_model(TINY, device="cpu")
    before = [name for name, _ in model.module.named_parameters()]
    try_device(model)
    assert [name for name, _ in model.module.named_parameters()] == before


@pytest.mark.parametrize(("breakage", "word"), [(rotary, "rope_type"), (damaged, "are off by inf")])
def test_a_base_that_cannot_be_trained_ends_the_start_and_reserves_nothing(
    site: RealSite, tmp_path: Path, breakage: object, word: str
) -> None:
    """The check has a failed line with a fix; the agent ends with the same words, before it was ever ready."""
    use(site, broken_base(tmp_path, breakage))
    line = {result.name: result for result in run_checks(site.home, SITE)}["device"]
    assert not line.ok
    assert word in line.message
    assert line.fix
    process = site.start(wait=False)
    said = site.finish()
    assert process.returncode not in (0, 70), said
    assert word in said
    assert "Traceback" not in said
    assert "is ready" not in said
    assert site.spends() == []


@pytest.mark.parametrize(
    ("error", "fix"),
    [
        (RuntimeError("Failed to find C compiler. Please specify via CC environment variable"), COMPILER),
        (subprocess.CalledProcessError(1, ["/usr/bin/gcc", "main.c", "-O3", "-I/usr/include/python3.11"]), COMPILER),
        (PermissionError(13, "Permission denied", "/nonexistent/.triton"), CACHE),
        (OSError(28, "No space left on device", "/var/cache/concordat/x/triton/ab"), CACHE),
        (OSError(30, "Read-only file system", "/var/cache/triton"), CACHE),
        (ImportError("/tmp/c/cuda_utils.so: failed to map segment from shared object"), CACHE),
        (RuntimeError("0 active drivers ([]). There should only be one."), DRIVER),
        (RuntimeError("CUDA error: no kernel image is available for execution on the device"), DRIVER),
        (RuntimeError("The NVIDIA driver on your system is too old (found version 11040)."), DRIVER),
        (subprocess.CalledProcessError(255, ["ptxas", "-lineinfo", "-v"]), DRIVER),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, Exception) else "",
)
def test_every_way_a_gpu_is_not_ready_has_its_fix(error: Exception, fix: str) -> None:
    """The words of Triton, CUDA and the system, as they come, lead to the next step."""
    made = explain(error, CUDA)
    assert made.fix == fix
    assert str(error).splitlines()[0][:60] in made.message


def test_memory_that_does_not_suffice_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Out of memory in the trial is a ConfigError that names smaller bases, not a defect."""
    assert "memory" in explain(torch.OutOfMemoryError("CUDA out of memory"), CUDA).message
    assert "int4" in explain(torch.OutOfMemoryError("CUDA out of memory"), CUDA).fix


def test_a_cache_that_others_may_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled kernels are loaded into the trusted half: a directory of mode 0777 is no place for them."""
    model = load_model(TINY, device="cpu")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tmp_path.chmod(0o777)
    with pytest.raises(ConfigError, match="others may write"):
        try_device(model)
    tmp_path.chmod(0o700)
    assert try_device(model)


TRITON = """
import os, sys
import torch
from fl_client.training.device import explain
from triton.runtime.build import compile_module_from_src
try:
    compile_module_from_src('#include <Python.h>\\nPyMODINIT_FUNC PyInit_probe(void){static struct PyModuleDef m='
        '{PyModuleDef_HEAD_INIT,"probe"};return PyModule_Create(&m);}', "probe")
except Exception as error:
    print(explain(error, torch.device("cuda")).fix)
else:
    print("built")
"""


@needs_triton
def test_tritons_own_build_without_compiler_or_cache(tmp_path: Path) -> None:
    """Triton really builds and loads a module; without a compiler, with a failing one, without a cache it says so."""

    def build(**env: str) -> str:
        return subprocess.run(
            [sys.executable, "-c", TRITON], env={**os.environ, **env}, capture_output=True, text=True, check=True
        ).stdout.strip()

    blocked = tmp_path / "file"
    blocked.touch()
    assert build(TRITON_CACHE_DIR=str(tmp_path / "a")) == "built"
    assert build(TRITON_CACHE_DIR=str(tmp_path / "b"), PATH=str(tmp_path)) == COMPILER
    assert build(TRITON_CACHE_DIR=str(tmp_path / "c"), CC="/bin/false") == COMPILER
    assert build(TRITON_CACHE_DIR=str(tmp_path / "d"), CC="/nonexistent/cc") == COMPILER
    assert build(TRITON_CACHE_DIR=str(blocked / "under")) == CACHE


def test_an_engine_error_passes_as_it_is(tmp_path: Path) -> None:
    """What the engine's own checks say is not dressed up as a fault of the device."""
    model = load_model(broken_base(tmp_path, damaged), device="cpu")
    with pytest.raises(EngineError, match="are off by inf"):
        try_device(model)
