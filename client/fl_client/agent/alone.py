"""A site trains a run's spec by itself: the baseline that shows what federation adds.

Nothing is cheaper here than in a federated run: each round is ordered by a document (signed by a key made
for this run), held against the same policy, reserved and settled in the same ledger as `alone:NAME`, and
its update passes the same choke point (docs/decisions/0002).
"""

from __future__ import annotations

import dataclasses
import functools
import json
import secrets
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from fl_client.agent.site import OpenSite
from fl_client.tasks.registry import task_of
from fl_client.tasks.task import require_usable
from fl_shared.adapters.safetensors import digest, pack, unpack
from fl_shared.documents.aggregators import ROBUST
from fl_shared.documents.order import RoundOrder
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import BudgetExhausted, PolicyRefusal, RunError
from fl_shared.files import write_durably
from fl_shared.identity.signing import SigningKey, sign_document
from fl_shared.ledger.suspension import resume_command
from fl_shared.names import ALONE

_ERRORS = {"budget-exhausted": BudgetExhausted, "policy": PolicyRefusal}


def _for_one(spec: RunSpec, site: str) -> RunSpec:
    """The spec for one site that it does not name; a rule that compares sites has nothing to compare there."""
    run = dataclasses.replace(spec.run, sites=(site,), quorum=1)
    if run.aggregation in ROBUST:
        return dataclasses.replace(spec, run=dataclasses.replace(run, aggregation="fedavg"), aggregation=())
    return dataclasses.replace(spec, run=run)


def train_alone(
    site: OpenSite, spec: RunSpec, order_key: SigningKey, out: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Run all rounds of `spec` at `site`; write `adapter.safetensors` and `receipts.json` into `out`.

    `order_key` is the key that the site's rounds accept orders from. A repeat with the same spec fetches
    what was released before and spends nothing. Raises the refusal of the first round that is refused, and DataError,
    before anything is charged, when the run can use no record.
    """
    require_usable(task_of(spec), site.data, "the training data")
    if site.config.site not in spec.run.sites:
        spec = _for_one(spec, site.config.site)
    run = f"{ALONE}{spec.run.name}"
    total: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
    receipts: list[dict[str, Any]] = []
    out.mkdir(parents=True, exist_ok=True)
    for number in range(1, spec.run.rounds + 1):
        adapter = pack(total)
        now = time.time()
        order = RoundOrder(
            run=run,
            round=number,
            site=site.config.site,
            spec_digest=spec.digest,
            adapter_digest=digest(adapter),
            nonce=secrets.token_hex(16),
            issued_at=now,
            expires_at=now + 3600.0,
        )
        signed = json.dumps(sign_document(order_key, order.to_dict()))
        sealed = site.rounds.handle(signed, functools.partial(bytes, adapter), spec.canonical)
        document = json.loads(sealed.document)
        if sealed.status != "ok":
            body = document["body"]
            error = _ERRORS.get(body["code"], RunError)
            raise error(
                f"round {number} of {spec.run.rounds}: {body['message']}",
                fix=f"{resume_command(site.config.site, run)}, once the log is clear"
                if body["code"] in ("suspended", "failed")
                else "change the spec, or the site's policy or budget; earlier rounds stay charged",
            )
        receipts.append(document)
        for name, value in unpack(sealed.payload, wire=spec.run.wire).items():
            total[name] = value if name not in total else total[name] + value
        spent = document["body"]["epsilon_spent_total"]
        say(f"round {number} of {spec.run.rounds} done; epsilon spent {spent:.3f}")
    path = out / "adapter.safetensors"
    write_durably(path, pack(total))
    write_durably(out / "receipts.json", (json.dumps(receipts, indent=2) + "\n").encode("utf-8"))
    last = receipts[-1]["body"]
    return {
        "run": run,
        "rounds": spec.run.rounds,
        "adapter": str(path),
        "receipts": str(out / "receipts.json"),
        "epsilon_spent_total": last["epsilon_spent_total"],
        "delta": last["delta"],
    }
