"""Several processes at one site: a round through real ranks, and how they end when one fails or the agent dies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import grpc
import numpy as np
import psutil
import pytest
import torch

from fl_client.agent import check
from fl_client.agent.status import agent_state
from fl_client.data.units import UnitData
from fl_client.model.load import load_model
from fl_client.site.config import ModelConfig
from fl_client.training.ranks import frames
from fl_client.training.ranks import group as ranks_group
from fl_client.training.ranks.group import RankGroup
from fl_client.training.round import train_round
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError, DataError, EngineError
from fl_shared.privacy.mechanism import Mechanism
from helpers.agents import MARKER, RealSite, body, spec
from helpers.gateway import Gateway
from helpers.smallest import smallest_base, smallest_digest

CONFIG = ModelConfig(directory=smallest_base(), device="cpu", threads=1, processes=2)
# So little noise that the update is the data's, and everybody is in: any process count must give the same one.
ALMOST_NONE = Mechanism(noise_multiplier=1e-4, sampling_probability=1.0, steps=2, clipping_norm=1.0)
MECHANISM = Mechanism(noise_multiplier=1.0, sampling_probability=0.5, steps=500, clipping_norm=1.0)


@pytest.fixture(scope="module")
def group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RankGroup]:
    """Two ranks on the CPU, started when a test needs them."""
    home = tmp_path_factory.mktemp("g")
    digest = smallest_digest()
    made = RankGroup(CONFIG, digest=digest, directory=home / "ranks", log_file=home / "ranks.log")
    yield made
    made.stop()


def data(label: str = "heart") -> UnitData:
    """Five units, one of them with two records."""
    texts = ("cough", "fever and cough", "chest pain", "pain", "a broken rib", "asthma")
    labels = ("lungs", "lungs", "heart", label, "heart", "lungs")
    return UnitData(texts, labels, np.array([0, 0, 1, 2, 3, 4]), 5, "f" * 64)


def ask(group: RankGroup, mechanism: Mechanism, *, label: str = "heart", progress=lambda **_: None):  # type: ignore[no-untyped-def]
    """One round."""
    made_for = spec("sha256:" + "0" * 64)
    return group.train(
        data(label), made_for, mechanism, {}, round=1, progress=progress, expected_batch=None, private=True
    )


def gone(pids: list[int], within_s: float = 20.0) -> bool:
    """Whether these processes have ended."""
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not any(psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie" for pid in pids):
            return True
        time.sleep(0.05)
    return False


def test_a_round_on_two_ranks_is_one_process_round(group: RankGroup) -> None:
    """With next to no noise two ranks and one process make the same update, and report the same mechanism."""
    heard: list[int] = []
    made = ask(group, ALMOST_NONE, progress=lambda step, steps: heard.append(step))
    alone = train_round(
        load_model(smallest_base(), device="cpu"), data(), spec("sha256:" + "0" * 64), ALMOST_NONE, {}, round=1
    )
    assert made.executed == ALMOST_NONE == alone.executed
    assert heard == [1, 2]
    assert made.update.keys() == alone.update.keys()
    apart = np.sqrt(sum(float(((made.update[n] - alone.update[n]) ** 2).sum()) for n in alone.update))
    size = np.sqrt(sum(float((value**2).sum()) for value in alone.update.values()))
    assert apart < 0.02 * size


def test_all_ranks_are_tried_before_a_round_and_compute_to_the_same_bits(
    group: RankGroup, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which rank a unit falls to follows from the others in the sample: ranks that compute otherwise are refused."""
    made_for = spec("sha256:" + "0" * 64)
    heard: list[dict[str, Any]] = []
    right = frames.receive

    def noted(channel: socket.socket) -> tuple[dict[str, Any], bytes]:
        head, payload = right(channel)
        heard.append(head)
        return head | ({"witness": "another"} if odd and len(heard) == 2 else {}), payload

    monkeypatch.setattr(ranks_group, "receive", noted)
    for odd in (False, True):
        group.start()
        heard.clear()
        ready = pytest.raises(EngineError, match="different bits") if odd else contextlib.nullcontext()
        with ready:
            group.prepare(made_for, {}, private=True, max_adapter_norm=10.0, records_per_unit=2)
        assert len(heard) == 2
        assert len({head["witness"] for head in heard}) == 1
        assert heard[0]["witness"]


def test_a_rank_killed_in_mid_step_ends_the_round(group: RankGroup) -> None:
    """The ranks stay loaded between rounds; kill -9 of one is a typed error without a wait, and nobody is left."""
    group.start()
    pids = group.pids()
    ask(group, ALMOST_NONE)
    assert group.pids() == pids

    def progress(step: int, steps: int) -> None:
        if step == 2:
            os.kill(pids[1], signal.SIGKILL)

    with pytest.raises(EngineError, match="rank"):
        ask(group, MECHANISM, progress=progress)
    assert gone(pids)


def test_strangers_get_no_data_and_a_failing_rank_ends_all(group: RankGroup, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process but the keeper's descendants can take a rank's place; a rank's error arrives with its type."""
    told: list[bytes] = []
    launch = RankGroup._launch

    def intrude(self: RankGroup, directory: Path):  # type: ignore[no-untyped-def]
        def call() -> None:
            with socket.socket(socket.AF_UNIX) as channel:
                channel.connect(str(directory / "s"))
                told.append(channel.recv(1))

        threading.Thread(target=call).start()
        return launch(self, directory)

    group.stop()
    monkeypatch.setattr(RankGroup, "_launch", intrude)
    group.start()
    pids = group.pids()
    assert told == [b""]
    assert os.getpid() not in pids
    with pytest.raises(DataError, match="outside the run's 2 labels"):
        ask(group, ALMOST_NONE, label="liver")
    assert gone(pids)


def test_ranks_work_for_an_agent_and_die_with_it(tmp_path: Path, gateway: Gateway) -> None:
    """`processes = 2`: a round is answered and settled; kill -9 of the agent in the next one leaves no rank behind."""
    site = RealSite(tmp_path / "home", gateway)
    text = site.home.config.read_text()
    site.home.config.write_text(text.replace('device = "cpu"', 'device = "cpu"\nprocesses = 2'))
    digest = smallest_digest()
    try:
        process = site.start()
        children = psutil.Process(process.pid).children(recursive=True)
        ranks = [p.pid for p in children if "fl_client.training.ranks" in _line(p)]
        assert len(ranks) >= 2
        answered = site.order(site.manifest(1, spec(digest, steps=3)))
        assert (answered.status, body(answered)["steps_executed"]) == ("ok", 3)
        threading.Thread(target=_order, args=(site, spec(digest, steps=4000)), daemon=True).start()
        deadline = time.monotonic() + 60
        while agent_state(site.home) != "training":
            assert time.monotonic() < deadline
            time.sleep(0.05)
        site.kill()
        assert gone(ranks)
        assert [row.outcome for row in site.spends()] == ["settled", "open"]
        assert MARKER.encode() not in (site.home.logs / "ranks.log").read_bytes()
    finally:
        if site.process is not None and site.process.poll() is None:
            site.kill()


@pytest.mark.parametrize(("cores", "gpus", "fits"), [(2, 0, True), (1, 0, False), (1, 2, True), (8, 1, False)])
def test_the_check_counts_what_there_is(monkeypatch: pytest.MonkeyPatch, cores: int, gpus: int, fits: bool) -> None:
    """`fl-client check` refuses more processes than GPUs, or than the CPU has cores, and says what to write."""
    config: Any = SimpleNamespace(model=CONFIG, source=Path("site.toml"))
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    if gpus:  # stands in for a machine with GPUs
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        found = SimpleNamespace(digest="sha256:0", device=torch.device("cuda"))
        monkeypatch.setattr(check, "load_base", lambda _: found)
    if fits:
        told = check._model(config, vars(check)["load_base"](config))
        assert ("2 GPUs" if gpus else "2 processes") in told
        return
    with pytest.raises(ConfigError) as caught:
        check._model(config, vars(check)["load_base"](config))
    assert "processes" in caught.value.message
    assert "write processes = 1" in caught.value.fix


def _order(site: RealSite, made_for: RunSpec) -> None:
    with contextlib.suppress(grpc.RpcError):
        site.order(site.manifest(1, made_for, run="demo-2"))


def _line(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
