"""`tests/gpu/all.py`: a walk of the same way on the CPU, and what one part's failure leaves of the others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import pytest

from helpers.benchmarks import load_benchmark

every = load_benchmark("all", "gpu")
ROOT = Path(__file__).resolve().parents[2]
PINS = dict(
    line.split("==") for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines() if "==" in line
)
# What a machine with PyTorch has: torch, what it needs itself, numpy and scipy.
THERE = ("torch", "filelock", "fsspec", "jinja2", "markupsafe", "mpmath", "networkx", "sympy", "typing-extensions",
         "numpy", "scipy")  # fmt: skip


def bare(root: Path) -> Path:
    """A directory with the packages that a PyTorch machine has and the listed wheels, and nothing else."""
    for name in (*THERE, *every.WHEELS):
        found = metadata.distribution(name)
        for top in {Path(str(file)).parts[0] for file in found.files or ()} - {"..", "__pycache__"}:
            if not (root / top).exists():
                (root / top).symlink_to(Path(str(found.locate_file(top))))
    return root


def test_the_wheels_are_the_pinned_ones_and_travel_light(capsys: pytest.CaptureFixture[str]) -> None:
    """`--wheels` names each with the version of constraints.txt; below 60 MB in all."""
    assert every.main(["--wheels"]) == 0
    lines = capsys.readouterr().out.splitlines()
    known = {name.lower().replace("_", "-"): version for name, version in PINS.items()}
    listed = dict(line.split()[0].split("==") for line in lines[:-1])
    assert listed == {name: known[name] for name in every.WHEELS}
    assert sum(every.WHEELS.values()) < 60e6
    assert f"{len(every.WHEELS)} wheels" in lines[-1]


@pytest.mark.timeout(1800)
def test_a_walk_on_the_cpu_with_nothing_but_the_wheels(tmp_path: Path) -> None:
    """Every part but invariance, whose benchmark has its own test, measures; no package of ours is to be found."""
    (tmp_path / "site").mkdir()
    parts = [part.name for part in every.PARTS if part.name != "invariance"]
    python: str = sys._base_executable  # type: ignore[attr-defined]  # CPython's: the one without our environment
    line = [python, str(ROOT / "tests/gpu/all.py"), "--device", "cpu", "--small", "--out", "out", "--json"]
    kept = {key: value for key, value in os.environ.items() if key not in ("VIRTUAL_ENV", "PYTHONHOME")}
    done = subprocess.run(
        [*line, "--parts", *parts], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**kept, "PYTHONPATH": str(bare(tmp_path / "site"))},
    )  # fmt: skip
    report = json.loads(done.stdout)
    logs = {file.name: file.read_text(errors="replace")[-2000:] for file in (tmp_path / "out").glob("*.log")}
    assert {part["part"]: part["status"] for part in report["parts"]} == dict.fromkeys(parts, "measured"), logs
    assert done.returncode == 0
    figures = {part["part"]: part["figures"] for part in report["parts"]}
    assert figures["kernels"]["within_bounds"]
    assert {case["bits"] for case in figures["kernels"]["accuracy"]} == {8, 4}
    (step,) = figures["step"]["models"]
    assert len(step["time_vs_peft_of_each_pair"]) == 1
    assert figures["generation"]["tiny"]["share_of_same_tokens"] > 0.9
    assert figures["nccl"]["backend"] == "gloo"
    assert report["machine"]["torch"]
    assert json.loads((tmp_path / "out/report.json").read_text()) == report
    page = (tmp_path / "out/report.md").read_text()
    assert all(part["question"] in page for part in report["parts"])
    assert "time_vs_peft" in page


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., dict[str, dict[str, Any]]]:
    """Run scripts of one's own as the parts; the report's entries by name."""

    def go(limit_s: float, **scripts: str) -> dict[str, dict[str, Any]]:
        made = []
        for name, text in scripts.items():
            file = tmp_path / f"{name}.py"
            if text:
                file.write_text(text)
            made.append(every.Part(name, f"{name}?", str(file), limit_s))
        monkeypatch.setattr(every, "PARTS", tuple(made))
        every.main(["--out", str(tmp_path / "out"), "--device", "cpu", "--small"])
        report = json.loads((tmp_path / "out/report.json").read_text())
        assert (tmp_path / "out/report.md").is_file()
        return {entry["part"]: entry for entry in report["parts"]}

    return go


KEEPS = "import json, pathlib, sys\nout = pathlib.Path(sys.argv[sys.argv.index('--out') + 1])\n"


def test_one_failure_leaves_the_others_figures(parts: Callable[..., dict[str, dict[str, Any]]]) -> None:
    """A crash, a kill, a missing script and a part without figures are said; what came before the end is kept."""
    found = parts(
        30.0,
        absent="",
        crashed=KEEPS + "out.write_text(json.dumps({'first': 1}))\nraise RuntimeError('no kernel image')\n",
        killed="import os\nos.kill(os.getpid(), 9)\n",
        silent="print('nothing to read')\n",
        skipped=KEEPS + "out.write_text(json.dumps({'skipped': 'needs two GPUs'}))\n",
        prints="import json\nprint(json.dumps({'bitwise': True}))\n",
        whole=KEEPS + "out.write_text(json.dumps({'first': 1, 'second': 2}))\n",
    )
    assert {name: entry["status"] for name, entry in found.items()} == {
        "absent": "absent", "crashed": "failed", "killed": "failed", "silent": "failed", "skipped": "skipped",
        "prints": "measured", "whole": "measured",
    }  # fmt: skip
    assert found["crashed"]["figures"] == {"first": 1}
    assert "no kernel image" in found["crashed"]["reason"]
    assert "-9" in found["killed"]["reason"]
    assert found["skipped"]["reason"] == "needs two GPUs"
    assert found["prints"]["figures"] == {"bitwise": True}
    assert found["whole"]["figures"] == {"first": 1, "second": 2}


def test_a_part_that_hangs_is_ended_with_all_its_processes(
    parts: Callable[..., dict[str, dict[str, Any]]], tmp_path: Path
) -> None:
    """Its figures so far are kept, its child is gone, and the next part runs."""
    hanging = KEEPS + (
        "import subprocess, time\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "out.write_text(json.dumps({'child': child.pid}))\ntime.sleep(600)\n"
    )
    found = parts(2.0, hanging=hanging, after="print('{\"a\": 1}')\n")
    assert found["hanging"]["status"] == "stopped"
    child = found["hanging"]["figures"]["child"]
    ends = time.monotonic() + 20
    while psutil.pid_exists(child) and psutil.Process(child).status() != "zombie":
        assert time.monotonic() < ends
        time.sleep(0.05)
    assert found["after"]["figures"] == {"a": 1}


def test_the_real_shapes_are_refused_on_a_cpu(tmp_path: Path) -> None:
    """`--device cpu` without `--small`, and no `--out`, are usage errors."""
    for line in (["--out", str(tmp_path), "--device", "cpu"], ["--small"]):
        with pytest.raises(SystemExit) as ended:
            every.main(line)
        assert ended.value.code == 2
