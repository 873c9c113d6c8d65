"""What a round's orders cost the coordinator: time to sign and store them, bytes in SQL, bytes of one order.

Orders that name the spec by its digest are issued to every site of a run, as a round does it. Orders that hold the
spec, which sites of the version before get, are issued to a tenth of the sites and scaled. Bytes in SQL are what the
SQLite file grows by for a round, indexes included. `*_ratio`: the whole ones in units of those by digest.

    python tests/benchmarks/orders.py --json                 1,000 sites, a few seconds
    python tests/benchmarks/orders.py --json --sites 100

The bars: at most 1 s and 1 MB a round of 1,000 sites.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import sqlalchemy as sa

from fl_server.db.models import SiteRow
from fl_server.db.store import Store
from fl_server.runs.orders import Orders
from fl_server.runs.service import Runs
from fl_shared.adapters.safetensors import digest
from fl_shared.documents.order import BY_DIGEST
from fl_shared.documents.spec import RunSpec
from fl_shared.identity.signing import SigningKey

SITES, ROUNDS = 1000, 3


def spec_of(sites: int) -> RunSpec:
    """A run of `sites` sites."""
    return RunSpec.from_dict(
        {
            "run": {
                "name": "benchmark",
                "base_model": "sha256:" + "0" * 64,
                "sites": [f"hospital-{number:04}" for number in range(sites)],
                "rounds": 100,
                "quorum": sites,
            },
            "task": {"kind": "classification", "labels": ["a", "b"], "max_tokens": 8},
            "lora": {"rank": 4, "targets": ["attention"]},
            "training": {
                "noise_multiplier": 1.0,
                "clipping_norm": 1.0,
                "sampling_probability": 0.1,
                "steps_per_round": 2,
                "learning_rate": 0.1,
                "head_learning_rate": 1.0,
            },
        }
    )


def issue(folder: Path, spec: RunSpec, reads: int, sites: int) -> dict[str, Any]:
    """Rounds of orders to the first `sites` sites, which read orders of kind `reads`, in a new database."""
    path = folder / f"{reads}.sqlite"
    store = Store(f"sqlite:///{path}")
    store.migrate()
    with store.write() as session:
        session.execute(sa.insert(SiteRow), [{"site": s, "state": "enrolled", "invited_at": 0} for s in spec.run.sites])
    Runs(store).launch(spec)
    orders, key, seconds, sizes = Orders(store), SigningKey.generate(), [], []
    for number in range(ROUNDS + 1):
        began = time.perf_counter()
        adapter = digest(b"adapter %d" % number)
        made = orders.issue(spec, number + 1, dict.fromkeys(spec.run.sites[:sites], reads), adapter, key, 600.0)
        seconds.append(time.perf_counter() - began)
        with store.read() as session:
            sizes.append(
                int(session.scalar(sa.text("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size")))
            )
    store.close()
    return {
        "seconds": statistics.median(seconds[1:]),
        "sql_bytes": (sizes[-1] - sizes[0]) / ROUNDS,
        "order_bytes": max(len(each.document.encode()) for each in made.values()),
        "spec_bytes": len(next(iter(made.values())).spec_json.encode()),
    }


def measure(sites: int) -> dict[str, Any]:
    """Both kinds of orders for a run of `sites` sites."""
    spec, some = spec_of(sites), max(1, sites // 10)
    with tempfile.TemporaryDirectory() as scratch:
        ours = issue(Path(scratch), spec, BY_DIGEST, sites)
        whole = issue(Path(scratch), spec, 0, some)
    seconds, whole_seconds = ours["seconds"] / sites * 1000, whole["seconds"] / some * 1000
    sql, whole_sql = ours["sql_bytes"], whole["sql_bytes"] / some * sites
    return {
        "sites": sites,
        "seconds_per_1000_orders": round(seconds, 3),
        "sql_bytes_per_round": round(sql),
        "order_bytes": ours["order_bytes"],
        "spec_bytes": ours["spec_bytes"],
        "whole": {
            "seconds_per_1000_orders": round(whole_seconds, 3),
            "sql_bytes_per_round": round(whole_sql),
            "order_bytes": whole["order_bytes"],
        },
        "seconds_ratio": round(whole_seconds / seconds, 1),
        "sql_bytes_ratio": round(whole_sql / sql, 1),
        "order_bytes_ratio": round(whole["order_bytes"] / ours["order_bytes"], 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sites", type=int, default=SITES, help="how many sites the run has (default %(default)s)")
    parser.add_argument("--json", action="store_true", help="print one JSON object and nothing else")
    options = parser.parse_args()
    found = measure(options.sites)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            print(f"{name}: {json.dumps(value)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
