"""One rank: a process of the trusted half that torchrun starts, `python -m fl_client.training.ranks.worker DIRECTORY`.

It connects to the agent's socket in DIRECTORY, loads the base model onto its device once, and then trains its share
of every round that the agent hands it. It opens no ledger, no key and no configuration. Whatever fails is told to the
agent by type and public message; then the rank waits for the end, which the agent brings to the whole group.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import socket
import sys
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import distributed as dist

from fl_client.data.units import UnitData
from fl_client.dp.shard import Shard
from fl_client.model.load import choose_device, load_model
from fl_client.node.sandbox import forbid_inspection
from fl_client.tasks.cache import RecordCache
from fl_client.training.device import try_device
from fl_client.training.ranks.frames import receive, send
from fl_client.training.round import prepare_round, train_round
from fl_shared.adapters.safetensors import pack, unpack
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, ConfigError, EngineError
from fl_shared.privacy.mechanism import Mechanism
from fl_shared.runtime.logs import adopt_libraries, set_up
from fl_shared.runtime.processes import die_with_parent

if TYPE_CHECKING:
    from fl_client.model.load import LoadedModel

SOCKET, STORE = "s", "store"
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
"""How long a rank waits for the others within a step before the round fails: the last resort. A rank that fails
says so at once, and the agent then ends all of them."""

log = logging.getLogger("fl_client.training.ranks")


def join(directory: Path, device: str) -> Shard:
    """Enter the group that torchrun made. The store is a file: no port of it is open to other programs."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    place = choose_device(device)
    if place.type == "cuda":
        here = int(os.environ["LOCAL_RANK"])
        if here >= torch.cuda.device_count():
            raise ConfigError(
                f"[model] processes = {size}, but this machine has {torch.cuda.device_count()} GPUs",
                fix="use at most one process per GPU",
            )
        place = torch.device("cuda", here)
        torch.cuda.set_device(place)
    dist.init_process_group(
        "nccl" if place.type == "cuda" else "gloo",
        store=dist.FileStore(str(directory / STORE), size),  # type: ignore[attr-defined]  # exported without saying so
        rank=rank,
        world_size=size,
        timeout=COLLECTIVE_TIMEOUT,
    )
    return Shard(place)


def train(
    model: LoadedModel, shard: Shard, job: dict[str, Any], adapter: bytes, channel: socket.socket, cache: RecordCache
) -> None:
    """Train this rank's share of one round; the first rank reports progress and sends the update."""
    data = UnitData(
        tuple(job["texts"]), tuple(job["labels"]), np.array(job["unit_of_record"], dtype=np.int64), job["units"], ""
    )
    if not job["private"] and not shard.first:
        send(channel, {"done": True})  # without clipping there is nothing to share out: the first rank trains alone
        return

    def progress(*, step: int, steps: int) -> None:
        if shard.first:
            send(channel, {"step": step, "steps": steps})

    result = train_round(
        model,
        data,
        RunSpec.from_dict(job["spec"]),
        Mechanism.from_dict(job["mechanism"]),
        unpack(adapter),
        round=job["round"],
        progress=progress,
        expected_batch=job["expected_batch"],
        most_units=job["most_units"],
        records_per_unit=job["records_per_unit"],
        private=job["private"],
        shard=shard if job["private"] else None,
        cache=cache,
    )
    if shard.first:
        send(
            channel, {"done": True, "executed": result.executed.to_dict(), "report": result.report}, pack(result.update)
        )
    else:
        send(channel, {"done": True})


def prepare(model: LoadedModel, job: dict[str, Any], adapter: bytes) -> dict[str, Any]:
    """Do a round's public half; what it raises is told, and the rank goes on."""
    try:
        prepared = prepare_round(
            model, RunSpec.from_dict(job["spec"]), unpack(adapter), private=job["private"],
            max_adapter_norm=job["max_adapter_norm"], records_per_unit=job["records_per_unit"],
        )  # fmt: skip
    except ConcordatError as error:
        return error.to_dict()
    return {"done": True, "witness": prepared.adapted.witness}


def serve(directory: Path, channel: socket.socket) -> None:
    """Join, load, and train what comes; returns when the agent closes the connection."""
    hello, _ = receive(channel)
    torch.set_num_threads(hello["threads"])
    shard = join(directory, hello["device"])
    model = dataclasses.replace(load_model(hello["model"], device=str(shard.device)), engine=hello["engine"])
    adopt_libraries()
    log.info("device: %s", try_device(model))
    send(channel, {"ready": True, "digest": model.digest})
    cache = RecordCache()
    while True:
        job, adapter = receive(channel)
        if job.get("prepare"):
            send(channel, prepare(model, job, adapter))
            continue
        train(model, shard, job, adapter, channel, cache)


def main() -> int:
    """Run one rank until the agent is gone."""
    set_up(f"rank-{os.environ['RANK']}", withhold=True)
    forbid_inspection()
    die_with_parent()
    directory = Path(sys.argv[1])
    with socket.socket(socket.AF_UNIX) as channel:
        channel.connect(str(directory / SOCKET))
        try:
            send(channel, {"rank": int(os.environ["RANK"])})
            serve(directory, channel)
        except EOFError:
            return 0
        except ConcordatError as error:
            failure = error.to_dict()
        except Exception as error:  # the type alone is told: a message may quote data
            log.exception("the job failed")
            failure = EngineError(f"failed: {type(error).__name__}", fix="report this defect").to_dict()
        try:
            send(channel, failure)
            receive(channel)
        except (OSError, EOFError):
            return 1
    return 1


if __name__ == "__main__":
    status = main()
    sys.stdout.flush()
    os._exit(status)  # a rank that failed may have collectives under way, whose clean-up would wait for the others
