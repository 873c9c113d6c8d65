"""What a round costs the coordinator: time against Flower's FedAvg, memory in adapters, bytes on the wire.

Both sides get the same float32 values as replies of Flower. Ours checks each reply's layout, shapes and values, adds
it up in float64 and packs the next adapter; `flwr.serverapp.strategy.FedAvg.aggregate_train` has no checks. The two
alternate, and medians are compared. The SHA-256 of every reply, which the coordinator holds against the receipt and
which Flower's strategy does not know, is timed by itself (`time_ratio_with_sha256` includes it).

Memory is measured in a process for each aggregator, whose replies come one after the other from a file: the reply, the
sums and the result, above what the process held before. The global adapter that goes out to the sites is held anyway
and is not counted; it is one adapter more.

    python tests/benchmarks/aggregation.py --json
    python tests/benchmarks/aggregation.py --quick --json    5 MB instead of 50
    python tests/benchmarks/aggregation.py --full --json     1,000 sites, and the memory of every aggregator

What carrying the bytes costs is measured by `transport.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Array, Message
from flwr.serverapp.strategy import FedAvg

from fl_server.aggregation import RoundAggregate
from fl_server.rounds.replies import octets
from fl_shared.adapters.safetensors import WIRES, Tensors, digest, pack, unpack
from fl_shared.documents.aggregators import AGGREGATIONS
from fl_shared.documents.spec import RunSpec

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from helpers.flower_messages import reply  # noqa: E402 - made importable above
from helpers.specs import run_spec  # noqa: E402 - same

MB = 1_000_000
SITES, BYTES = 20, 50 * MB
RANK, HIDDEN = 16, 2048
# One thread; and freed memory goes back to the system at once, so that what is resident is what is held.
QUIET = {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000", "MALLOC_TRIM_THRESHOLD_": "65536"}


def spec_of(name: str, sites: int, wire: str = "float32") -> RunSpec:
    """A run of `sites` sites under aggregator `name`."""
    return run_spec(
        sites=[f"site-{number}" for number in range(sites)],
        quorum=sites,
        aggregation=name,
        wire=wire,
        rank=RANK,
        steps_per_round=2,
    )


def tensors(size: int, seed: int = 0) -> Tensors:
    """About `size` bytes of float32 LoRA factors of a 2048-wide model, rank 16."""
    rng = np.random.default_rng(seed)
    layers = max(1, size // (2 * 4 * RANK * HIDDEN))
    made: Tensors = {}
    for layer in range(layers):
        made[f"layers.{layer}.q_proj.lora_A.weight"] = rng.standard_normal((RANK, HIDDEN), dtype=np.float32)
        made[f"layers.{layer}.q_proj.lora_B.weight"] = rng.standard_normal((HIDDEN, RANK), dtype=np.float32)
    return made


def as_reply(update: bytes, node: int) -> Message:
    """A site's reply as it reaches the ServerApp."""
    return reply({"adapter": np.frombuffer(update, dtype=np.uint8)}, node)


def update_of(message: Message) -> memoryview:
    """The bytes that a site sent, where they lie."""
    arrays: Any = message.content["arrays"]
    return octets(arrays["adapter"])


def against_flower(repeats: int, size: int) -> dict[str, Any]:
    """Times of one round of 20 sites with `size` bytes each, all replies waiting; without their hash once more."""
    ours, theirs, hashes = [], [], []
    values = tensors(size)
    base = pack(values)
    updates = [{name: value * np.float32(1 + site / 50) for name, value in values.items()} for site in range(SITES)]
    packed = [pack(update) for update in updates]
    digests = [digest(update) for update in packed]
    mine = [as_reply(update, node) for node, update in enumerate(packed, start=1)]
    their = [reply(update, node) for node, update in enumerate(updates, start=1)]
    sizes = sum(len(update) for update in packed)
    del packed, updates
    strategy = FedAvg()
    with tempfile.TemporaryDirectory() as scratch:
        for _ in range(repeats):
            began = time.perf_counter()
            arrays, _ = strategy.aggregate_train(1, their)
            theirs.append(time.perf_counter() - began)
            began = time.perf_counter()
            collected = RoundAggregate(spec_of("fedavg", SITES), base, b"", Path(scratch))
            for message in mine:
                collected.add(unpack(update_of(message)))
            adapter, _ = collected.finish()
            ours.append(time.perf_counter() - began)
            began = time.perf_counter()
            if [digest(update_of(message)) for message in mine] != digests:
                raise SystemExit("a reply came out with another hash")
            hashes.append(time.perf_counter() - began)
    found = unpack(adapter)
    if arrays is None:
        raise SystemExit("Flower's strategy made nothing of its replies")
    difference = max(float(np.abs(found[name] - values[name] - arrays[name].numpy()).max()) for name in values)
    ratio = statistics.median(o / t for o, t in zip(ours, theirs, strict=True))
    return {
        "sites": SITES,
        "adapter_bytes": len(base),
        "repeats": repeats,
        "time_ratio_vs_flwr": round(ratio, 3),
        "time_ratio_with_sha256": round(
            statistics.median((o + h) / t for o, t, h in zip(ours, theirs, hashes, strict=True)), 3
        ),
        "ratios": sorted(round(o / t, 3) for o, t in zip(ours, theirs, strict=True)),
        "largest_difference": difference,
        "bytes_per_round": sizes + SITES * len(base),
    }


def prepare(folder: Path, size: int, wire: str) -> None:
    """Write a global adapter, a reply as Flower holds it in memory, and the reply's digest."""
    folder.mkdir()
    values = tensors(size)
    sent = pack(values, wire=wire)
    (folder / "base").write_bytes(pack(values))
    (folder / "reply").write_bytes(Array(np.frombuffer(sent, dtype=np.uint8)).data)
    (folder / "digest").write_text(digest(sent))


def replies(source: Path, count: int) -> Iterator[Message]:
    """One reply after the other, each read from the file."""
    length = source.stat().st_size
    for node in range(count):
        data = source.read_bytes()
        message = as_reply(b"", node)
        arrays: Any = message.content["arrays"]
        arrays["adapter"] = Array("uint8", (length,), "numpy.ndarray", data)
        del data, arrays
        yield message
        del message


def stream(name: str, sites: int, wire: str, folder: Path) -> dict[str, Any]:
    """One round whose replies come one by one: peak memory in adapters, time for each site.

    Runs in a process of its own, after a round of small updates that loads the code.
    """
    for warm in (True, False):
        source = folder / ("small" if warm else "large")
        base, wanted = (source / "base").read_bytes(), (source / "digest").read_text()
        held = _resident(peak=False)
        Path("/proc/self/clear_refs").write_text("5")
        began = time.perf_counter()
        collected = RoundAggregate(spec_of(name, sites, wire), base, b"", folder)
        for message in replies(source / "reply", 3 if warm else sites):
            update = update_of(message)
            if digest(update) != wanted:
                raise SystemExit("a reply came out with another hash")
            collected.add(unpack(update, wire=wire))
            del message, update
        streamed = _resident(peak=True) - held
        state = collected.finish()[1]
        seconds = time.perf_counter() - began
        peak = _resident(peak=True) - held
    return {
        "aggregator": name,
        "wire": wire,
        "sites": sites,
        "adapter_bytes": len(base),
        "reply_bytes": (source / "reply").stat().st_size,
        "state_bytes": len(state),
        "peak_adapters": round(peak / len(base), 2),
        "peak_adapters_while_streaming": round(streamed / len(base), 2),
        "seconds_per_site": round(seconds / sites, 4),
    }


def _resident(*, peak: bool) -> int:
    """Bytes resident now, or at most since the mark was reset."""
    name = "VmHWM" if peak else "VmRSS"
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise SystemExit("this system does not tell a process's memory; the benchmark needs Linux")


def apart(name: str, sites: int, size: int, wire: str = "float32") -> dict[str, Any]:
    """`stream` in a process of its own."""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        prepare(folder / "small", MB, wire)
        prepare(folder / "large", size, wire)
        task = json.dumps({"name": name, "sites": sites, "wire": wire, "folder": scratch})
        done = subprocess.run(
            [sys.executable, __file__, "--stream", task],
            capture_output=True, text=True, check=True, timeout=1800, env=os.environ | QUIET,
        )  # fmt: skip
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def wire_bytes() -> dict[str, dict[str, float]]:
    """Bytes of one 50 MB update in each encoding and the error it makes on Gaussian values."""
    values = tensors(10 * MB)
    whole = np.concatenate([value.reshape(-1) for _, value in sorted(values.items())])
    found = {}
    for wire in WIRES:
        data = pack(values, wire=wire)
        back = np.concatenate([value.reshape(-1) for _, value in sorted(unpack(data, wire=wire).items())])
        error = np.abs(back - whole)
        found[wire] = {
            "bytes_ratio": round(len(data) / len(pack(values)), 4),
            "largest_error_over_largest_value": float(error.max() / np.abs(whole).max()),
            "rms_error_over_rms_value": float(np.sqrt(np.mean(error**2) / np.mean(whole**2))),
        }
    return found


def measure(*, full: bool, quick: bool, say: Callable[[str], None]) -> dict[str, Any]:
    size = BYTES // 10 if quick else BYTES
    say(f"20 x {size // MB} MB against Flower's FedAvg ...")
    found: dict[str, Any] = against_flower(9 if full else 5, size)
    say(f"memory, 20 x {size // MB} MB ...")
    streamed = [apart("fedavg", SITES, size)]
    found["peak_adapters"] = streamed[0]["peak_adapters"]
    if full:
        for name in AGGREGATIONS:
            if name != "fedavg":
                say(f"memory under {name}, 20 x 50 MB ...")
                streamed.append(apart(name, SITES, BYTES))
        streamed += [apart("fedavg", SITES, BYTES, wire) for wire in WIRES[1:]]
    sites, each = 1000 if full else 100, (1 if quick else 10) * MB
    say(f"{sites} sites x {each // MB} MB ...")
    found["many_sites"] = apart("fedavg", sites, each)
    found["streamed"] = streamed
    found["wires"] = wire_bytes()
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--full", action="store_true", help="1,000 sites, and the memory of every aggregator")
    length.add_argument("--quick", action="store_true", help="about a minute; the figures are rough")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    parser.add_argument("--stream", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.stream:
        task = json.loads(options.stream)
        print(json.dumps(stream(task["name"], task["sites"], task["wire"], Path(task["folder"]))))
        return 0
    found = measure(full=options.full, quick=options.quick, say=lambda text: print(text, file=sys.stderr))
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name}: {json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
