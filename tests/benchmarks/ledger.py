"""How fast the ledger is, and how that changes as it grows, on SQLite.

    python tests/benchmarks/ledger.py --json            100,000 entries, about two minutes
    python tests/benchmarks/ledger.py --json --quick    10,000, in less than one
    python tests/benchmarks/ledger.py --json --full     a million, about ten

Large ledgers are written in bulk, with real signatures, hashes, typed rows, sums and tree nodes, so that they
verify; what is measured then goes through the public service. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import sqlalchemy as sa
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fl_shared.canonical import canonical_bytes, sha256_hex
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger, chain
from fl_shared.ledger.merkle import Tree
from fl_shared.ledger.models import entries, merkle_nodes, reservations, settlements, tallies, tally_keys
from fl_shared.ledger.verify import verify_ledger
from fl_shared.privacy.mechanism import Mechanism

SITE = "hospital-001"
ROUND = Mechanism(noise_multiplier=40.0, sampling_probability=0.01, steps=1, clipping_norm=1.0)
BATCH = 20_000


def log(text: str) -> None:
    """Say on stderr how it goes."""
    print(text, file=os.sys.stderr, flush=True)  # type: ignore[attr-defined]


class Bulk:
    """Appends signed entries with typed rows, sums and tree nodes, many in one transaction."""

    def __init__(self, ledger: Ledger, key: SigningKey) -> None:
        self._store, self._key = ledger._store, key
        with self._store.read() as connection:
            self._tally = int(connection.execute(sa.select(tally_keys.c.id)).scalar_one())
            self._version, self._spent = connection.execute(
                sa.select(tallies.c.version, tallies.c.spent).order_by(tallies.c.version.desc()).limit(1)
            ).one()
            hashes = connection.execute(sa.select(entries.c.hash).order_by(entries.c.seq)).scalars()
            self._tree = Tree()
            for digest in hashes:
                self._tree.add(digest)
        head = ledger.head()
        self.seq, self._prev, self._moment = head.entries, head.hash, datetime.now(UTC)
        self._rows: dict[str, list[dict[str, Any]]] = {}

    def put(self, kind: str, body: dict[str, Any], *, held: int, spent: int) -> None:
        """Append one entry; the sums move by `held` and `spent`."""
        self.seq, self._moment = self.seq + 1, self._moment + timedelta(microseconds=1)
        stamp, text = chain.timestamp(self._moment), canonical_bytes(body).decode()
        message = chain.message_bytes(
            seq=self.seq, kind=kind, body=text, prev_hash=self._prev, created_at=stamp, site=SITE
        )
        digest = sha256_hex(message)
        entry = {"seq": self.seq, "kind": kind, "body": text, "prev_hash": self._prev, "hash": digest}
        self._add("entries", entry | {"signature": self._key.sign(message), "created_at": stamp})
        self._add(f"{kind}s", {"seq": self.seq, **body})
        self._version, self._spent = self._version + 1, self._spent + spent
        sums = {"key": self._tally, "version": self._version, "held": held, "spent": self._spent}
        self._add("tallies", {"seq": self.seq} | sums)
        for level, position, node in self._tree.add(digest):
            self._add("merkle_nodes", {"level": level, "position": position, "hash": node})
        self._prev = digest

    def _add(self, table: str, row: dict[str, Any]) -> None:
        self._rows.setdefault(table, []).append(row)

    def write(self) -> None:
        """Write what was put since the last time."""
        with self._store.write() as connection:
            for table in (entries, reservations, settlements, tallies, merkle_nodes):
                connection.execute(table.insert(), self._rows[table.name])
        self._rows.clear()


def grow(url: str, key: SigningKey, size: int) -> None:
    """Append settled rounds until the ledger has `size` entries (or one less)."""
    with Ledger.open(url, key, SITE) as ledger:
        dataset = ledger.register_dataset("icd", "sha256:icd", "record", 50_000, 1)
        ledger.set_budget(dataset, 1000.0, 1e-6, "DPO")
        held = ledger.reserve(dataset, ROUND, run="seed", round=ledger.head().entries)
        ledger.settle(held, ROUND, "sha256:seed")
        bulk = Bulk(ledger, key)
        while bulk.seq + 2 <= size:
            for _ in range(min(BATCH, size - bulk.seq) // 2):
                place = {"dataset": "icd", "dataset_seq": dataset.seq, "study": "", "run": f"bulk-{bulk.seq // 1000}"}
                order = place | {"round": bulk.seq, "purpose": "training", "attempt": 1} | ROUND.to_dict()
                bulk.put("reservation", order, held=1, spent=0)
                end = {"reservation": bulk.seq, "outcome": "settled", "steps": 1, "reason": ""}
                bulk.put("settlement", end | {"release_digest": f"sha256:{bulk.seq}"}, held=0, spent=1)
            bulk.write()


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes."""
    start = time.perf_counter()
    act()
    return time.perf_counter() - start


def reserve_and_settle(url: str, key: SigningKey, count: int) -> list[float]:
    """Seconds of each of `count` reserve+settle pairs, both committed with synchronous FULL."""
    with Ledger.open(url, key, SITE) as ledger:
        first = ledger.head().entries

        def pair(number: int) -> None:
            held = ledger.reserve("icd", ROUND, run="bench", round=number)
            ledger.settle(held, ROUND, "sha256:bench")

        pair(first)
        return [timed(partial(pair, number)) for number in range(first + 1, first + 1 + count)]


def epsilon_now(url: str, key: SigningKey, count: int) -> list[float]:
    """Seconds of each of `count` readings of epsilon, opening included in none."""
    with Ledger.open(url, key, SITE) as ledger:
        return [timed(lambda: ledger.epsilon("icd")) for _ in range(count)]


def _signatures(seconds: float) -> float:
    key, message = Ed25519PrivateKey.generate(), b"x" * 520  # an entry's message is about that long
    public, signature = key.public_key(), key.sign(message)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        for _ in range(500):
            public.verify(signature, message)
        count += 500
    return count / (time.perf_counter() - start)


def signature_limit(seconds: float = 2.0) -> float:
    """Signatures a second that the library alone checks, with a process on each core."""
    cores = os.cpu_count() or 1
    with ProcessPoolExecutor(cores) as pool:
        return sum(pool.map(_signatures, [seconds] * cores))


def exponent(points: list[tuple[int, float]]) -> float:
    """Slope of log(time) against log(size) by least squares: 0 is constant, 1 linear."""
    logs = [(math.log(size), math.log(value)) for size, value in points]
    middle = [statistics.fmean(axis) for axis in zip(*logs, strict=True)]
    above = sum((x - middle[0]) * (y - middle[1]) for x, y in logs)
    return above / sum((x - middle[0]) ** 2 for x, _y in logs)


def sizes(largest: int) -> Iterator[int]:
    """1,000, 10,000, ... up to `largest`."""
    size = 1000
    while size < largest:
        yield size
        size *= 10
    yield largest


def measure(largest: int, directory: Path) -> dict[str, Any]:
    """Run everything; return the JSON object."""
    key, url = SigningKey.generate(), f"sqlite:///{directory / 'ledger.sqlite'}"
    steps: list[dict[str, float]] = []
    for size in sizes(largest):
        log(f"growing to {size:,} entries ...")
        grow(url, key, size)
        pairs = reserve_and_settle(url, key, 200)
        readings = epsilon_now(url, key, 30)
        limits, taken = [signature_limit()], []
        for _ in range(3):  # each between two readings of the limit: a machine's speed changes in seconds
            start = time.perf_counter()
            report = verify_ledger(url, SITE, public_key=key.public_hex)
            taken.append(time.perf_counter() - start)
            limits.append(signature_limit())
            if not report.intact:
                raise RuntimeError(f"the benchmark's ledger does not verify: {report.problems[:3]}")
        seconds, limit = statistics.median(taken), statistics.median(limits)
        shares = [2 * report.entries / each / (limits[at] + limits[at + 1]) for at, each in enumerate(taken)]
        steps.append(
            {
                "entries": report.entries,
                "reserve_settle_ms": 1000 * statistics.median(pairs),
                "reserve_settle_p99_ms": 1000 * sorted(pairs)[int(0.99 * len(pairs))],
                "epsilon_ms": 1000 * statistics.median(readings),
                "verify_s": seconds,
                "verify_entries_per_s": report.entries / seconds,
                "signature_limit_per_s": limit,
                "verify_vs_signature_limit": statistics.median(shares),
                "bytes": sum(path.stat().st_size for path in directory.iterdir()),
            }
        )
        log(json.dumps(steps[-1]))
    last = steps[-1]
    grown = {
        name: round(exponent([(int(step["entries"]), step[name]) for step in steps]), 3)
        for name in ("reserve_settle_ms", "epsilon_ms", "verify_s", "bytes")
    }
    return {
        "entries": int(last["entries"]),
        "cores": os.cpu_count(),
        "reserve_settle_per_s": round(1000 / last["reserve_settle_ms"], 1),
        "reserve_settle_ms": round(last["reserve_settle_ms"], 2),
        "reserve_settle_p99_ms": round(last["reserve_settle_p99_ms"], 2),
        "epsilon_ms": round(last["epsilon_ms"], 2),
        "epsilon_ms_at_1e6": round(last["epsilon_ms"] * (1_000_000 / largest) ** max(0.0, grown["epsilon_ms"]), 2),
        "projected": [] if largest == 1_000_000 else ["epsilon_ms_at_1e6"],
        "verify_entries_per_s": round(last["verify_entries_per_s"]),
        "signature_limit_per_s": round(last["signature_limit_per_s"]),
        "verify_vs_signature_limit": round(last["verify_vs_signature_limit"], 3),
        "growth_exponents": grown,
        "bytes_per_entry": round(last["bytes"] / last["entries"]),
        "steps": [{name: round(value, 3) for name, value in step.items()} for step in steps],
    }


def main() -> None:
    """Parse the options, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--entries", type=int, default=100_000, metavar="N", help="the largest ledger (default 100,000)")
    size.add_argument("--full", action="store_true", help="a million entries")
    size.add_argument("--quick", action="store_true", help="10,000 entries; the figures are rough")
    parser.add_argument("--json", action="store_true", help="print one JSON object (the only format)")
    arguments = parser.parse_args()
    if arguments.entries < 2000:
        parser.error(f"--entries {arguments.entries}: growth shows from 2000 on")
    with tempfile.TemporaryDirectory(prefix="concordat-bench-") as directory:
        entries = 1_000_000 if arguments.full else 10_000 if arguments.quick else arguments.entries
        print(json.dumps(measure(entries, Path(directory)), indent=2))


if __name__ == "__main__":
    main()
