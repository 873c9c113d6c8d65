"""`fl-server up`: keeps SuperLink, gateway, control API and launcher running, and says what changes.

A child that dies, or that cannot be started (a full disk, no more processes, a file that is not there), is started
again after 1 s, 2 s, … up to 30 s; after 10 s of life the wait starts again at 1 s. Nothing of that ends this
process. Every child has its own process group and is killed by the kernel when this process is.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import shlex
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from fl_server.db.store import DatabaseAway, Store
from fl_server.flower.superlink import Flower, environment
from fl_server.home.layout import ServerHome, ServerSettings, reachable
from fl_shared.errors import ConcordatError, ConfigError
from fl_shared.files import write_durably
from fl_shared.runtime.locks import LockHeld, acquire
from fl_shared.runtime.private_files import close_to_others
from fl_shared.runtime.processes import end_group, free_port, spawn
from fl_shared.runtime.threads import reason
from fl_shared.wire.hosts import host_and_port

log = logging.getLogger("fl_server.operations.supervisor")

TICK_S = 0.25
PROBE_S = 2.0
STOP_S = 8.0
STALE_S = 15.0
FIRST_PAUSE_S, MOST_PAUSE_S, CALM_S = 0.5, 30.0, 10.0
SUPERLINK_TRIES = 3  # starts in a row that do not come to listening; then its database is made again


def _listens(host: str, port: int) -> bool:
    try:
        with socket.create_connection((host, port), timeout=1.0):
            return True
    except OSError:
        return False


@dataclass
class Component:
    """One child. `before` runs just before each start and returns the command."""

    name: str
    address: str
    before: Callable[[], list[str]]
    ready: Callable[[], bool]
    needs: tuple[str, ...] = ()
    process: subprocess.Popen[bytes] | None = None
    state: str = "stopped"
    started_at: float = 0.0
    pause: float = FIRST_PAUSE_S
    not_before: float = 0.0
    probed_at: float = field(default=0.0)
    why: str = ""


class Supervisor:
    """The parent of every process of a coordinator."""

    def __init__(self, home: ServerHome, *, logs_to_files: bool = True) -> None:
        self._home = home
        self._logs_to_files = logs_to_files
        self._settings = home.settings()
        self._flower = Flower(home)
        self._stopping = False
        self._lock = -1
        self._components = self._plan(self._settings)
        self._counting: dict[str, str] = {}
        self._written = ""
        self._written_at = 0.0
        self._unwritten = False
        self._superlink_starts = 0

    def _plan(self, settings: ServerSettings) -> list[Component]:
        superlink = Component("superlink", "127.0.0.1", self._superlink, self._superlink_ready)

        def module(name: str) -> Callable[[], list[str]]:
            return lambda: [sys.executable, "-m", f"fl_server.{name}", "--home", str(self._home.root)]

        monitor = []
        if settings.metrics is not None:
            host, port = settings.metrics
            monitor = [
                Component(
                    "monitor",
                    host_and_port(host, port),
                    module("operations.monitor"),
                    lambda: _listens(reachable(host), port),
                )
            ]
        return [
            superlink,
            Component(
                "gateway",
                f"https://{host_and_port(settings.listen, settings.gateway_port)}",
                module("gateway.app"),
                lambda: self._healthy(reachable(settings.listen), settings.gateway_port),
            ),
            Component(
                "control",
                host_and_port(settings.control_host, settings.control_port),
                module("control"),
                lambda: _listens(reachable(settings.control_host), settings.control_port),
            ),
            Component("launcher", "", module("rounds.launcher"), lambda: True, needs=("superlink",)),
            *monitor,
        ]

    def _superlink(self) -> list[str]:
        self._superlink_starts += 1
        if self._superlink_starts % SUPERLINK_TRIES == 0:  # it does not get up with this database, whatever is wrong
            self._flower.want_rebuild()
        if self._flower.set_aside():
            log.warning("superlink: its database is unusable; set aside in %s", self._home.flower / "aside")
        port = free_port()
        self._component("superlink").address = f"127.0.0.1:{port}"
        self._flower.configure(port)
        return self._flower.superlink_command(port)

    def _superlink_ready(self) -> bool:
        host, _, port = self._component("superlink").address.partition(":")
        if not _listens(host, int(port)):
            return False
        self._superlink_starts = 0
        return True

    def _healthy(self, host: str, port: int) -> bool:
        try:
            context = ssl.create_default_context(cafile=str(self._home.ca))
            context.check_hostname = False  # it listens at addresses that the certificate does not name
            with httpx.Client(verify=context, timeout=3.0, trust_env=False) as client:
                return client.get(f"https://{host_and_port(host, port)}/healthz").status_code in (200, 429)
        except httpx.HTTPError:
            return False

    def _component(self, name: str) -> Component:
        return next(component for component in self._components if component.name == name)

    def run(self) -> int:
        """Supervise until SIGTERM or Ctrl-C; 0 at the end.

        Raises:
            ConfigError: another `fl-server up` works on this home.
        """
        self._take_lock()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._ask_to_stop)
        log.info("coordinator at %s", self._home.root)
        changed = close_to_others(self._home.root)
        if changed:
            log.warning("closed %d files that others than their owner could open, e.g. %s", len(changed), changed[0])
        if self._settings.metrics is not None:
            shutil.rmtree(self._home.counters, ignore_errors=True)  # counters begin with the coordinator
            self._home.counters.mkdir(parents=True, mode=0o700)
            self._counting = {"PROMETHEUS_MULTIPROC_DIR": str(self._home.counters)}
        try:
            self._migrate()
            while not self._stopping:
                superlink = self._component("superlink").process
                if superlink is not None and self._flower.rebuild_wanted():
                    end_group(superlink, STOP_S)  # its turn finds it dead, and starts it with an empty database
                for component in self._components:
                    self._supervise(component)
                self._write_state()
                time.sleep(TICK_S)
        finally:
            self._stop()
        return 0

    def _migrate(self) -> None:
        """Bring the database up to date, as soon as it is there: after a power cut it may come up after us."""
        store, logged = Store(self._home.database_url()), ""
        while not self._stopping:
            try:
                store.migrate()
                break
            except DatabaseAway as error:
                if error.message != logged:
                    log.warning("waiting: %s", error.message)
                logged = error.message
                time.sleep(PROBE_S)
        store.close()

    def _take_lock(self) -> None:
        try:
            self._lock = acquire(self._home.root / "supervisor.lock")
        except LockHeld as error:
            raise ConfigError(
                f"a coordinator already runs at {self._home.root}",
                fix=f"stop it first, or look at it with `fl-server status --home {shlex.quote(str(self._home.root))}`",
            ) from error

    def _ask_to_stop(self, *_: object) -> None:
        self._stopping = True

    def _note_state(self, component: Component, state: str, more: str = "", why: str = "") -> None:
        if (component.state, component.why) != (state, why):
            component.state, component.why = state, why
            at = f" at {component.address}" if component.address and state == "ready" else ""
            level = logging.WARNING if state in ("died", "not started", "not answering") else logging.INFO
            log.log(level, "%s: %s%s%s", component.name, state, at, more)

    def _supervise(self, component: Component) -> None:
        """Look after one child. Whatever this meets, the others are looked after and it is tried again."""
        try:
            self._start_or_probe(component)
        except Exception as error:  # whatever it is: the other children are looked after all the same
            if not isinstance(error, ConcordatError | OSError):
                log.exception("%s: a turn failed", component.name)
            why = reason(error)
            if component.process is not None:
                self._note_state(component, "not answering", f": {why}", why)
                return
            pause = self._delay_start(component, time.monotonic(), lived_s=0.0)
            self._note_state(component, "not started", f": {why}; again in {pause:.0f} s", why)

    @staticmethod
    def _delay_start(component: Component, now: float, *, lived_s: float) -> float:
        """Put off the next start; the seconds until then."""
        component.pause = FIRST_PAUSE_S if lived_s > CALM_S else min(component.pause * 2, MOST_PAUSE_S)
        component.not_before = now + component.pause
        return component.pause

    def _start_or_probe(self, component: Component) -> None:
        now = time.monotonic()
        if component.process is None:
            needs_ready = all(self._component(name).state == "ready" for name in component.needs)
            if now >= component.not_before and needs_ready:
                command = component.before()
                file = self._home.logs / f"{component.name}.log" if self._logs_to_files else None
                component.process = spawn(command, environment(self._home) | self._counting, file)
                component.started_at, component.probed_at = now, 0.0
                self._note_state(component, "starting")
            return
        status = component.process.poll()
        if status is not None:
            end_group(component.process, 0.0)
            component.process = None
            pause = self._delay_start(component, now, lived_s=now - component.started_at)
            why = f"ended with status {status}; see logs/{component.name}.log"
            self._note_state(component, "died", f": {why}; again in {pause:.0f} s", why)
            return
        wait = PROBE_S if component.state == "ready" else TICK_S
        if now - component.probed_at > wait:
            component.probed_at = now
            if component.ready():
                self._note_state(component, "ready")
            elif component.state == "ready":
                self._note_state(component, "not answering")

    def _write_state(self) -> None:
        components: list[dict[str, Any]] = [
            {
                "name": component.name,
                "state": component.state,
                "address": component.address,
                "pid": component.process.pid if component.process else 0,
                "why": component.why,
            }
            for component in self._components
        ]
        text = json.dumps({"pid": os.getpid(), "components": components})
        if text != self._written or time.monotonic() - self._written_at > STALE_S / 3:
            self._written, self._written_at = text, time.monotonic()
            state = json.dumps(json.loads(text) | {"at": time.time()}).encode()
            try:
                write_durably(self._home.supervisor_state, state)
                self._unwritten = False
            except OSError as error:
                if not self._unwritten:
                    log.warning("%s cannot be replaced: %s", self._home.supervisor_state, reason(error))
                self._unwritten = True
                with contextlib.suppress(OSError):  # on a full disk the old file still takes as much as it held
                    _write_over(self._home.supervisor_state, state)

    def _stop(self) -> None:
        log.info("stopping")
        for component in reversed(self._components):
            if component.process is not None:
                end_group(component.process, STOP_S)
                component.process = None
            self._note_state(component, "stopped")
        self._write_state()
        os.close(self._lock)


def _write_over(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.pwrite(descriptor, content, 0)
        os.ftruncate(descriptor, len(content))
    finally:
        os.close(descriptor)


def component_names(settings: ServerSettings) -> list[str]:
    """The children of a coordinator, in the order of their start; the monitor only where `[metrics]` asks for it."""
    return ["superlink", "gateway", "control", "launcher", *(["monitor"] if settings.metrics is not None else [])]


def read_state(home: ServerHome) -> dict[str, Any]:
    """What `fl-server up` last said about itself; every component `stopped` when it does not run."""
    try:
        state = json.loads(home.supervisor_state.read_text("utf-8"))
        os.kill(int(state["pid"]), 0)
        if time.time() - float(state["at"]) <= STALE_S:
            return dict(state)
    except (OSError, ValueError, KeyError, TypeError):  # no process, or no state of one
        pass
    stopped = {"state": "stopped", "address": "", "pid": 0}
    return {"pid": 0, "components": [{"name": name, **stopped} for name in component_names(home.settings())]}


def is_ready(state: dict[str, Any]) -> bool:
    """Whether every component is ready."""
    return all(component["state"] == "ready" for component in state["components"])
