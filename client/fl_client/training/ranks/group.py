"""The agent's side of several ranks: start them under torchrun, hand them rounds, end them together.

torchrun runs inside the keeper of `fl_client.node.sandbox`, without confinement: when the agent ends, however it ends,
the keeper kills every rank (docs/decisions/0024). The ranks are part of the trusted half; they get each round over a
Unix socket whose every peer is checked to be a descendant of that keeper. Only the agent touches the ledger.
"""

from __future__ import annotations

import contextlib
import logging
import os
import select
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_client.data.units import UnitData
from fl_client.node.sandbox import Confinement
from fl_client.site.config import ModelConfig
from fl_client.training.ranks.frames import receive, send
from fl_shared.adapters.safetensors import pack, unpack
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, EngineError, ModelError
from fl_shared.privacy.mechanism import Mechanism

if TYPE_CHECKING:
    from fl_client.training.round import TrainingResult

log = logging.getLogger("fl_client.training.ranks")

START_S = 900.0
_STOP_S = 15.0
_LOG_LIMIT_BYTES = 4 << 20
_SOCKET = "s"


class RankGroup:
    """The ranks of one site. They stay loaded between rounds; after a failure the next round starts new ones.

    Args:
        config: model directory, device, threads and number of processes.
        digest: of the model that the site checked; a rank that loads anything else is refused.
        directory: private to the trusted half, for the socket.
        log_file: where torchrun and the ranks write. No private value goes there.
    """

    def __init__(self, config: ModelConfig, *, digest: str, directory: Path, log_file: Path) -> None:
        self._config, self._digest, self._parent, self._log = config, digest, directory, log_file
        self._keeper: subprocess.Popen[bytes] | None = None
        self._directory: Path | None = None
        self._channels: list[socket.socket] = []

    def start(self) -> None:
        """Start the ranks and wait until each has loaded the model; nothing happens when they run already.

        Raises:
            ModelError, ConfigError, EngineError: as the first rank that failed says, or none came up in time.
        """
        if self._alive():
            return
        self.stop()
        self._parent.mkdir(parents=True, exist_ok=True)
        self._directory = Path(tempfile.mkdtemp(prefix="r", dir=self._parent))  # mode 0700
        try:
            with socket.socket(socket.AF_UNIX) as listener:
                listener.bind(str(self._directory / _SOCKET))
                listener.listen(self._config.processes)
                self._keeper = self._launch(self._directory)
                self._channels = self._admit(listener, time.monotonic() + START_S)
            hello = {
                "model": str(self._config.directory), "device": self._config.device, "threads": self._config.threads,
                "engine": self._config.engine,
            }  # fmt: skip
            for channel in self._channels:
                send(channel, hello)
            for rank, (head, _) in enumerate(self._answers(lambda **_: None)):
                if head.get("digest") != self._digest:
                    raise ModelError(
                        f"rank {rank} loaded base model {head.get('digest')}, the site has {self._digest}",
                        fix="let nobody write to the model's directory while the agent runs",
                    )
        except BaseException:
            self.stop()
            raise
        log.info("%d ranks are ready", self._config.processes)

    def train(
        self,
        data: UnitData,
        spec: RunSpec,
        mechanism: Mechanism,
        offset: Mapping[str, Any],
        *,
        round: int,
        progress: Callable[..., None],
        expected_batch: float | None,
        most_units: int | None = None,
        records_per_unit: int | None = None,
        private: bool,
    ) -> TrainingResult:
        """One round on all ranks; as `fl_client.training.round.train_round`. On any failure all ranks end, at once."""
        from fl_client.training.round import TrainingResult  # torch

        self.start()
        job = {
            "texts": data.texts,
            "labels": data.labels,
            "unit_of_record": data.unit_of_record.tolist(),
            "units": data.units,
            "spec": spec.to_dict(),
            "mechanism": mechanism.to_dict(),
            "round": round,
            "expected_batch": expected_batch,
            "most_units": most_units,
            "records_per_unit": records_per_unit,
            "private": private,
        }
        adapter = pack(dict(offset))
        try:
            for channel in self._channels:
                send(channel, job, adapter)
            head, update = self._answers(progress)[0]
            return TrainingResult(unpack(update), Mechanism.from_dict(head["executed"]), head["report"])
        except BrokenPipeError:
            self.stop()
            raise _ended("one of them") from None
        except BaseException:  # also when `progress` stops the round: no rank may go on alone
            self.stop()
            raise

    def prepare(
        self, spec: RunSpec, offset: Mapping[str, Any], *, private: bool, max_adapter_norm: float, records_per_unit: int
    ) -> None:
        """Do on all ranks what `fl_client.training.round.prepare_round` does; what it raises ends no rank.

        Raises EngineError when the ranks compute one and the same public units to different bits: which rank a unit
        falls to follows from the others in the sample.
        """
        self.start()
        try:
            job = {
                "prepare": True, "spec": spec.to_dict(), "private": private, "max_adapter_norm": max_adapter_norm,
                "records_per_unit": records_per_unit,
            }  # fmt: skip
            for channel in self._channels:
                send(channel, job, pack(dict(offset)))
            heads = [receive(channel)[0] for channel in self._channels]
        except (BrokenPipeError, EOFError):
            self.stop()
            raise _ended("one of them") from None
        for rank, head in enumerate(heads):
            if "error" in head:
                raise _typed(rank, head)
        if len({head["witness"] for head in heads}) > 1:
            raise EngineError(
                "the processes compute to different bits", fix="use devices of one kind, or [model] processes = 1"
            )

    def pids(self) -> list[int]:
        """The process id of each rank, by rank."""
        return [_peer(channel) for channel in self._channels]

    def stop(self) -> None:
        """End the ranks and whatever they started."""
        for channel in self._channels:
            channel.close()
        self._channels = []
        if self._keeper is not None:
            if self._keeper.stdin is not None:
                with contextlib.suppress(BrokenPipeError):
                    self._keeper.stdin.close()  # the keeper kills its descendants and ends
            try:
                self._keeper.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                self._keeper.kill()
                self._keeper.wait()
            self._keeper = None
        if self._directory is not None:
            shutil.rmtree(self._directory, ignore_errors=True)
            self._directory = None

    def _alive(self) -> bool:
        """Whether all ranks are there; one that is gone has closed its end of the connection."""
        if self._keeper is None or self._keeper.poll() is not None or not self._channels:
            return False
        readable, _, _ = select.select(self._channels, [], [], 0)
        return not readable  # between rounds a rank has nothing to say

    def _launch(self, directory: Path) -> subprocess.Popen[bytes]:
        if self._log.exists() and self._log.stat().st_size > _LOG_LIMIT_BYTES:
            self._log.replace(self._log.with_suffix(".log.1"))
        self._log.touch(mode=0o600)
        command = [
            sys.executable, "-m", "torch.distributed.run", "--standalone", "--nnodes=1", "--max-restarts=0",
            f"--nproc-per-node={self._config.processes}", "-m", "fl_client.training.ranks.worker", str(directory),
        ]  # fmt: skip
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(self._config.threads),
            "TOKENIZERS_PARALLELISM": "false",
            "GLOO_SOCKET_IFNAME": "lo",
            "NCCL_SOCKET_IFNAME": "lo",
        }
        settings = Confinement(
            command=command, environment=environment, directory=str(directory), log=str(self._log),
            readable=[], writable=[], connect_ports=[], bind_ports=[], mode="off",
        )  # fmt: skip
        keeper = subprocess.Popen(
            [sys.executable, "-m", "fl_client.node.sandbox"],
            stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
        )  # fmt: skip
        if keeper.stdin is not None:
            keeper.stdin.write(settings.to_line())
            keeper.stdin.flush()
        return keeper

    def _admit(self, listener: socket.socket, deadline: float) -> list[socket.socket]:
        """Accept one connection from each rank; anybody else who finds the socket is turned away."""
        if self._keeper is None:
            raise RuntimeError("no keeper was started")
        channels: dict[int, socket.socket] = {}
        listener.settimeout(0.2)
        try:
            while len(channels) < self._config.processes:
                if self._keeper.poll() is not None or time.monotonic() > deadline:
                    raise EngineError("the ranks did not start", fix=f"look into {self._log}")
                try:
                    channel, _ = listener.accept()
                except TimeoutError:
                    continue
                if not _descends(_peer(channel), self._keeper.pid):
                    log.warning("a process that is no rank tried to connect to the ranks' socket")
                    channel.close()
                    continue
                channel.settimeout(None)
                channels[int(receive(channel)[0]["rank"])] = channel
        except BaseException:
            for channel in channels.values():
                channel.close()
            raise
        return [channels[rank] for rank in range(self._config.processes)]

    def _answers(self, progress: Callable[..., None]) -> list[tuple[dict[str, Any], bytes]]:
        """Each rank's final answer, by rank. Raises what the first rank that fails says, and when one dies."""
        answers: dict[int, tuple[dict[str, Any], bytes]] = {}
        while len(answers) < len(self._channels):
            waiting = [channel for rank, channel in enumerate(self._channels) if rank not in answers]
            readable, _, _ = select.select(waiting, [], [])
            for channel in readable:
                rank = self._channels.index(channel)
                try:
                    head, payload = receive(channel)
                except EOFError:
                    raise _ended(f"rank {rank}") from None
                if "error" in head:
                    raise _typed(rank, head)
                if "step" in head:
                    progress(step=head["step"], steps=head["steps"])
                else:
                    answers[rank] = head, payload
        return [answers[rank] for rank in range(len(self._channels))]


def _ended(who: str) -> EngineError:
    return EngineError(
        f"of the processes that train together, {who} ended", fix="look for the kernel's out-of-memory killer"
    )


def _typed(rank: int, head: Mapping[str, Any]) -> ConcordatError:
    try:
        failure = ConcordatError.from_dict(head)
    except ValueError:
        failure = EngineError("failed, and does not say how", fix="report this defect")
    return type(failure)(f"rank {rank}: {failure.message}", fix=failure.fix, code=failure.code)


def _peer(channel: socket.socket) -> int:
    """Process id of the other side, as the kernel knows it."""
    size = struct.calcsize("3i")
    pid: int = struct.unpack("3i", channel.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))[0]
    return pid


def _descends(pid: int, ancestor: int) -> bool:
    """Whether `ancestor` is `pid` or one of its parents; a process that is gone has none."""
    while pid > 1:
        if pid == ancestor:
            return True
        try:
            state = Path(f"/proc/{pid}/stat").read_text(encoding="ascii", errors="replace")
            pid = int(state.rpartition(")")[2].split()[1])  # the name before it may hold anything
        except (OSError, ValueError, IndexError):
            return False
    return False
