"""Everything that wants a GPU, in under eight minutes: one command for the day that one is at hand.

Each part is a process of its own with a time limit; what it measured before it failed or was stopped is kept, and the
others go on. DIR gets `report.json`, `report.md` and each part's output. Nothing is fetched from a network: where only
torch, triton, numpy and scipy are installed, the wheels that `--wheels` lists must travel along (their needs included).

    python tests/gpu/all.py --out DIR
    python tests/gpu/all.py --out DIR --device cpu --small     # a walk of the same way; its figures mean nothing
    python tests/gpu/all.py --wheels
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BUDGET_S = 470.0
# Wheels of the versions in constraints.txt for CPython 3.11 on x86-64: name to bytes.
WHEELS = {
    "absl-py": 137_673, "accelerate": 394_295, "anyio": 134_521, "attrs": 60_752, "certifi": 134_093, "cffi": 217_807,
    "cryptography": 4_752_576, "dp-accounting": 131_489, "h11": 37_515, "httpcore": 78_784, "httpcore2": 85_551,
    "httpx": 73_517, "httpx2": 97_893, "huggingface-hub": 857_021, "idna": 69_583, "opacus": 308_911,
    "opt-einsum": 71_932, "packaging": 66_469, "peft": 835_427, "psutil": 155_560, "pycparser": 62_600,
    "pyyaml": 806_638, "regex": 806_289, "safetensors": 516_040, "structlog": 73_764, "tokenizers": 3_396_193,
    "tqdm": 80_199, "transformers": 13_336_114, "truststore": 19_017,
}  # fmt: skip


@dataclass(frozen=True)
class Part:
    """One script, the question it answers, and the seconds it may take."""

    name: str
    question: str
    script: str
    limit_s: float


PARTS = (
    Part("kernels", "Do the kernels give the reference's products, and how fast?", "tests/gpu/matmul.py", 60),
    Part("invariance", "Does a unit contribute the same bits beside any others?", "tests/benchmarks/invariance.py", 90),
    Part("step", "What does a private step cost against Hugging Face with PEFT?", "tests/gpu/step.py", 225),
    Part("generation", "How fast is generation, and is it the float model's?", "tests/gpu/generation.py", 55),
    Part("nccl", "Do two GPUs make the update that one makes?", "tests/gpu/nccl.py", 40),
)


def command(part: Part, options: argparse.Namespace, figures: Path) -> list[str]:
    """The part's command line."""
    line = [sys.executable, str(ROOT / part.script), "--device", options.device]
    if part.name == "invariance":  # prints its figures
        return [*line, "--json"]
    line += ["--out", str(figures), *(["--small"] if options.small else [])]
    if part.name == "step":
        line += ["--variants", "book", "peft", "plain", "--rounds", "1" if options.small else "2"]
    return line


def run(part: Part, options: argparse.Namespace, limit_s: float) -> dict[str, Any]:
    """Run one part to its end or its limit; never raises for what the part does."""
    found: dict[str, Any] = {"part": part.name, "question": part.question}
    if not (ROOT / part.script).is_file():
        return found | {"status": "absent", "reason": f"{part.script} does not exist here"}
    if limit_s < 5:
        return found | {"status": "not run", "reason": "no time was left"}
    figures, log = options.out / f"{part.name}.json", options.out / f"{part.name}.log"
    figures.unlink(missing_ok=True)
    started = time.monotonic()
    with log.open("wb") as errors, tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command(part, options, figures), cwd=ROOT, env=_environment(options), stdin=subprocess.DEVNULL,
            stdout=printed, stderr=errors, start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = process.wait(timeout=limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            _end(process)
        printed.seek(0)
        text = printed.read().decode(errors="replace")
    found["seconds"] = round(time.monotonic() - started, 1)
    measured = _figures(figures, text)
    last = [line for line in log.read_text(errors="replace").splitlines() if line.strip()][-1:]
    if status is None:
        found |= {"status": "stopped", "reason": f"took longer than {limit_s:.0f} s"}
    elif measured and "skipped" in measured:
        found |= {"status": "skipped", "reason": measured.pop("skipped")}
    elif status != 0:
        found |= {"status": "failed", "reason": f"exit status {status}: {''.join(last)[:400]}"}
    elif not measured:
        found |= {"status": "failed", "reason": "it printed no figures"}
    else:
        found["status"] = "measured"
    return found | ({"figures": measured} if measured else {})


def _environment(options: argparse.Namespace) -> dict[str, str]:
    """Sources found without an installation; kernels compiled into a directory of this run; no network."""
    paths = [str(ROOT / name) for name in ("shared", "client", "tests")]
    added = {
        "PYTHONPATH": os.pathsep.join([*paths, *filter(None, [os.environ.get("PYTHONPATH")])]),
        "TRITON_CACHE_DIR": str(options.out / "kernels-cache"),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }
    if options.device == "cpu" and find_spec("triton"):
        added["TRITON_INTERPRET"] = "1"
    return {**os.environ, **added}


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill whatever is left of a part: it leads a session of its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _figures(file: Path, printed: str) -> dict[str, Any]:
    """What the part kept in its file, else what it printed; {} when neither is an object."""
    for text in (file.read_text(encoding="utf-8") if file.is_file() else "", printed):
        try:
            found = json.loads(text)
        except ValueError:
            continue
        if isinstance(found, dict) and found:
            return found
    return {}


def machine(device: str) -> dict[str, Any]:
    """Device, driver and versions, as a process of its own finds them: a broken driver must not end this one."""
    code = (
        "import json, torch; c = torch.cuda.is_available(); print(json.dumps({'torch': torch.__version__, "
        "'cuda': torch.version.cuda, 'gpus': [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]"
        " if c else [], 'memory_bytes': torch.cuda.get_device_properties(0).total_memory if c else None}))"
    )
    found: dict[str, Any] = {"device": device, "python": platform.python_version(), "processor": platform.machine()}
    found |= json.loads(_said([sys.executable, "-c", code]) or "{}")
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    found["driver"] = next(iter(_said(query).splitlines()), None)
    for name in ("triton", "transformers", "peft", "opacus", "numpy"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    found["commit"] = _said(["git", "-C", str(ROOT), "rev-parse", "HEAD"]).strip() or None
    return found


def _said(line: Sequence[str]) -> str:
    """What a command prints; "" when it fails, hangs or does not exist."""
    try:
        done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def page(report: Mapping[str, Any]) -> str:
    """The report in Markdown."""
    about = report["machine"]
    lines = ["# GPU report", "", *(f"* {key}: {_words(value)}" for key, value in about.items()), ""]
    lines += ["| part | status | seconds | |", "|---|---|---|---|"]
    for part in report["parts"]:
        why = str(part.get("reason", "")).replace("|", "\\|")
        lines.append(f"| {part['part']} | {part['status']} | {part.get('seconds', '')} | {why} |")
    for part in report["parts"]:
        lines += ["", f"## {part['question']}", ""]
        lines += _list(part.get("figures", {})) or [f"{part['status']}: {part.get('reason', '')}"]
    return "\n".join(lines) + "\n"


def _list(figures: Mapping[str, Any], depth: int = 0) -> list[str]:
    """Nested figures as nested points."""
    lines: list[str] = []
    for key, value in figures.items():
        point = f"{'  ' * depth}* {key}"
        if isinstance(value, dict):
            lines += [f"{point}:", *_list(value, depth + 1)]
        elif _objects(value):
            lines.append(f"{point}:")
            for each in value:
                plain = {k: v for k, v in each.items() if not isinstance(v, dict) and not _objects(v)}
                lines.append(f"{'  ' * (depth + 1)}* " + ", ".join(f"{k} {_words(v)}" for k, v in plain.items()))
                lines += _list({k: v for k, v in each.items() if k not in plain}, depth + 2)
        else:
            lines.append(f"{point}: {_words(value)}")
    return lines


def _objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, dict) for each in value)


def _words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ", ".join(map(_words, value)) or "none"
    return "not known" if value is None else str(value)


def wheels() -> int:
    """List what travels; the exit status."""
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    versions = {name.lower().replace("_", "-"): version.strip() for name, version in pins.items()}
    for name, size in sorted(WHEELS.items()):
        print(f"{name}=={versions[name]:12} {size / 1e6:6.1f} MB")
    print(f"{len(WHEELS)} wheels, {sum(WHEELS.values()) / 1e6:.1f} MB; torch, triton, numpy and scipy are there")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Run the parts; 0 when none failed or was stopped, 1 otherwise: the report is written either way."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, metavar="DIR", help="where the report goes")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu only with --small")
    parser.add_argument("--small", action="store_true", help="tiny shapes")
    parser.add_argument("--parts", nargs="+", choices=[part.name for part in PARTS], help="only these")
    parser.add_argument("--json", action="store_true", help="print the report as one JSON object")
    parser.add_argument("--wheels", action="store_true", help="list what a machine with torch alone needs, and end")
    options = parser.parse_args(argv)
    if options.wheels:
        return wheels()
    if options.out is None:
        parser.error("give --out DIR")
    if options.device == "cpu" and not options.small:
        parser.error("the real shapes need a GPU; take --small with --device cpu")
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    patience = 4 if options.small else 1  # a walk on a busy machine is no measurement
    ends = time.monotonic() + BUDGET_S * patience
    report: dict[str, Any] = {"machine": machine(options.device), "small": options.small, "parts": []}
    for part in PARTS:
        if options.parts and part.name not in options.parts:
            continue
        limit = min(part.limit_s * patience, ends - time.monotonic())
        print(f"{part.name} (at most {limit:.0f} s)", file=sys.stderr, flush=True)
        report["parts"].append(run(part, options, limit))
        (options.out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        (options.out / "report.md").write_text(page(report), encoding="utf-8")
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        for part in report["parts"]:
            print(f"{part['part']:11} {part['status']:9} {part.get('reason', '')}")
        print(f"report: {options.out / 'report.md'}")
    return int(any(part["status"] in ("failed", "stopped", "not run") for part in report["parts"]))


if __name__ == "__main__":
    sys.exit(main())
