"""Supervise the two helper processes of a site: the tunnel (trusted) and the SuperNode (not).

The SuperNode runs code that the coordinator ships. It gets its own session and process group, an
environment built from nothing, no inherited file descriptor, Flower's node key, and the kernel's
confinement (`fl_client.node.sandbox`). Both processes end when the agent does, however it ends.
"""

from __future__ import annotations

import contextlib
import functools
import json
import logging
import os
import pwd
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import fl_shared
from fl_client.node.handover import mode_in
from fl_client.node.reaping import MOST_TASKS
from fl_client.node.sandbox import Confinement, Walls
from fl_client.node.tunnel import NODE_LEFT, READY, TunnelSettings
from fl_shared.errors import ConcordatError, ConfigError
from fl_shared.files import socket_address, write_durably
from fl_shared.runtime.offline import OFFLINE
from fl_shared.runtime.processes import free_port
from fl_shared.runtime.threads import Loop

log = logging.getLogger("fl_client.node.supernode")

SYSTEM_READABLE = (
    "/usr", "/bin", "/lib", "/lib64", "/etc/ssl", "/etc/pki", "/etc/localtime", "/etc/ld.so.cache",
    "/etc/passwd", "/etc/group", "/etc/hosts", "/etc/resolv.conf", "/etc/nsswitch.conf",
    "/etc/os-release", "/dev/urandom", "/dev/random", "/proc", "/sys/devices/system/cpu",
)  # fmt: skip
_TUNNEL_WAIT_S = 30.0
_PROVEN_S = 10.0  # after a failure a process that runs for so long is well again
_STOP_S = 30.0  # a keeper that has much to kill needs its time
PLAN_FILE = "launch.json"


@dataclass(frozen=True)
class NodePlan:
    """Everything that one start of the SuperNode depends on. Holds no path outside its directory
    but the agent's socket.

    `directory` belongs to the agent's user: plan, node key and certificate lie there, and the untrusted half only
    reads them. Below it, `work` belongs to the untrusted half's user, and the code that the coordinator ships may
    write in `work/home` alone, which is new and empty at each start. So nothing that decides about a wall, and
    nothing that is run or read outside of it, lies where the walled can write.
    """

    directory: Path
    socket: Path
    node_key: Path
    tunnel_certificate: Path
    tunnel_port: int
    mode: str = "auto"
    user: str = ""

    def save(self) -> None:
        """Write the plan where `fl-client supernode` finds it."""
        table = {name: str(value) if isinstance(value, Path) else value for name, value in vars(self).items()}
        text = json.dumps(table, indent=2) + "\n"
        write_durably(self.directory / PLAN_FILE, text.encode("utf-8"), mode=mode_in(self.directory), exact=True)

    @property
    def home(self) -> Path:
        """The only directory in which the untrusted half may write."""
        return self.directory / "work" / "home"

    @classmethod
    def load(cls, directory: Path) -> NodePlan:
        """Read the plan that the agent wrote into `directory`; ConfigError when there is none, or not the agent's."""
        path = directory / PLAN_FILE
        require_own(directory, path)
        try:
            table = json.loads(path.read_text("utf-8"))
            return cls(
                directory=directory,
                socket=Path(table["socket"]),
                node_key=directory / Path(table["node_key"]).name,
                tunnel_certificate=directory / Path(table["tunnel_certificate"]).name,
                tunnel_port=int(table["tunnel_port"]),
                mode=str(table["mode"]),
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} cannot be read ({type(error).__name__})",
                fix="start the site's agent first: it writes this file; check --directory and its owner",
            ) from None


def shared_source() -> Path | None:
    """Return the directory to put on PYTHONPATH for `fl_shared`, None when it is installed."""
    place = Path(fl_shared.__file__).resolve().parent.parent
    inside = any(place.is_relative_to(Path(prefix).resolve()) for prefix in (sys.prefix, sys.base_prefix))
    return None if inside else place


def node_environment(directory: Path) -> dict[str, str]:
    """Return the whole environment of the untrusted half; nothing is inherited."""
    environment = {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), "/usr/bin", "/bin"]),
        "HOME": str(directory),
        "TMPDIR": str(directory / "tmp"),
        "FLWR_HOME": str(directory / "flwr"),
        **OFFLINE,
        "PYTHONUNBUFFERED": "1",
        "LANG": "C.UTF-8",
        "OMP_NUM_THREADS": "1",
    }
    source = shared_source()
    if source is not None:
        environment["PYTHONPATH"] = str(source)
    return environment


def require_own(directory: Path, plan: Path | None = None) -> None:
    """Refuse a directory of the untrusted half that anybody but its owner may write, or a plan of another owner.

    Without `plan`: as the agent, whose own the directory must be. Raises ConfigError.
    """
    fix = (
        f"let the agent's user own {directory} (chown, chmod 2750, in the group of both halves), and give the other "
        f"user {directory / 'work'} (install -d -m 700 -o USER)"
    )
    try:
        found = directory.stat()
        owner = os.geteuid() if plan is None else plan.stat(follow_symlinks=False).st_uid
    except OSError as error:
        hint = fix if plan is None else "start the site's agent first: it writes this file; check --directory"
        raise ConfigError(f"{error.filename} cannot be used: {error.strerror}", fix=hint) from None
    if found.st_mode & 0o022 or found.st_uid != owner:
        raise ConfigError(f"{directory} can be written by others than the agent's user", fix=fix)


def make_home(plan: NodePlan) -> None:
    """Make the untrusted half's own directory anew: what an app left there meets no later app. Raises ConfigError."""
    work = plan.home.parent
    try:
        work.mkdir(mode=0o711, exist_ok=True)
        if os.path.lexists(plan.home):
            plan.home.rename(work / f"old-{time.time_ns()}")
        plan.home.mkdir(mode=0o700)
        for name in ("tmp", "flwr"):
            (plan.home / name).mkdir(mode=0o700)
        if plan.user:  # we are root, `work` is ours and `home` is new: given away last, so that nobody has a hand in it
            owner = pwd.getpwnam(plan.user)
            for path in (plan.home / "tmp", plan.home / "flwr", plan.home):
                os.chown(path, owner.pw_uid, owner.pw_gid, follow_symlinks=False)
    except (OSError, LookupError) as error:
        raise ConfigError(
            f"[supernode] the untrusted half has no place to work in: {error}",
            fix=f"let the user that runs it own {work}: install -d -m 700 -o USER {work}",
        ) from None
    left = list(work.glob("old-*"))
    # An app may have closed its directories to its own user; a link that it left is not followed.
    closed = [each for each in left if not each.is_symlink()]
    for words, paths in ((["chmod", "-R", "u+rwx"], closed), (["rm", "-rf"], left)):
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):  # what is left is removed at the next start
            subprocess.run([*words, "--", *paths], stderr=subprocess.DEVNULL, timeout=60, check=False)


def node_confinement(plan: NodePlan, runtime_port: int) -> Confinement:
    """Return the confined command that runs the SuperNode with its Runtime API on `runtime_port`."""
    directory = plan.directory
    make_home(plan)
    record = (directory if os.access(directory, os.W_OK) else plan.home.parent) / "supernode.log"
    command = [
        str(Path(sys.executable).parent / "flower-supernode"),
        "--superlink", f"127.0.0.1:{plan.tunnel_port}",
        "--root-certificates", str(plan.tunnel_certificate),
        "--auth-supernode-private-key", str(plan.node_key),
        "--host", "127.0.0.1",
        "--port", str(runtime_port),
        "--node-config", f'agent-socket="{socket_address(plan.socket)}"',
    ]  # fmt: skip
    source = shared_source()
    readable = [sys.prefix, sys.base_prefix, *SYSTEM_READABLE, *([str(source)] if source else [])]
    readable += [str(plan.node_key), str(plan.tunnel_certificate)]
    return Confinement(
        command=command,
        environment=node_environment(plan.home),
        directory=str(plan.home),
        log=str(record),
        readable=readable,
        writable=[str(plan.home), "/dev/null"],
        connect_ports=[plan.tunnel_port, runtime_port],
        bind_ports=[runtime_port],
        mode=plan.mode,
        user=plan.user,
        tasks=MOST_TASKS,
        agent=str(plan.socket),
    )


def offered_walls(mode: str, user: str) -> Walls:
    """Which walls this machine offers. With mode "require" a missing one is a ConfigError that says what to do."""
    tried = Confinement(
        command=[], environment={}, directory="/", log="", readable=[sys.prefix, sys.base_prefix, *SYSTEM_READABLE],
        writable=["/dev/null"], connect_ports=[], bind_ports=[], user=user,
    )  # fmt: skip
    words = [sys.executable, "-P", "-m", "fl_client.node.sandbox", "--walls"]
    done = subprocess.run(
        words, input=tried.to_line(), capture_output=True, env=keeper_environment(), cwd="/", check=False
    )
    try:
        walls = Walls(**json.loads(done.stdout))
    except (ValueError, TypeError):
        raise ConfigError(
            f"[supernode] the walls around the untrusted half cannot be tried: {done.stderr.decode()[-300:].strip()}",
            fix="check [supernode] user, and that the agent may start processes",
        ) from None
    if mode == "require" and walls.missing():
        raise ConfigError(
            f'[supernode] confine is "require", and this machine lacks {"; ".join(walls.missing())}',
            fix="use a kernel of 5.13 or later with Landlock, and let this user make user namespaces (sysctl "
            "kernel.apparmor_restrict_unprivileged_userns=0, user.max_user_namespaces; in a container, its seccomp "
            'profile), or accept what is missing with confine = "auto" (docs/security.md)',
        )
    return walls


def describe_confinement(mode: str, user: str) -> str:
    """Say in one line how far the untrusted half is separated on this machine. ConfigError as `offered_walls`."""
    own = f"user {user}" if user else "same user"
    if mode == "off":
        return f"{own}, confine is off" if user else "NOT separated: same user, and confine is off"
    walls = offered_walls(mode, user)
    kinds = [] if walls.no_namespaces else ["own network, files and processes (namespaces)"]
    kinds += [f"Landlock (ABI {walls.landlock})"] if walls.landlock else []
    kinds += [] if walls.no_filter else ["seccomp"]
    if not kinds and not user:
        return "NOT separated: same user and no wall in this kernel; use [supernode] user, or a newer kernel"
    lacks = "; ".join(walls.missing())
    return ", ".join([own, *kinds]) + (f"; WITHOUT {lacks}" if lacks else "")


def listen_loopback(port: int = 0) -> socket.socket:
    """Return a listening loopback socket; the tunnel inherits it, so that restarts lose no port."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise ConfigError(
            f"[supernode] tunnel_port = {port} cannot be used: {error.strerror}",
            fix="choose another port, or 0 to let the system choose",
        ) from None
    listener.listen(64)
    return listener


class Helpers:
    """Keeps the tunnel and, if a plan is given, the SuperNode running until `stop`.

    A process that dies, or that cannot be started, is started again after 1 s, then 2 s, up to 30 s; the wait starts
    over after a minute of life. So is a SuperNode that has taken leave of the coordinator (after an answer that it
    does not understand it does so, and then lives on without ever asking for work again), or that keeps
    a reply to itself (`fl_client.node.tunnel.Debts`).
    """

    def __init__(
        self, settings: TunnelSettings, listener: socket.socket, plan: NodePlan | None, *, launch: bool = True
    ) -> None:
        """Take what the processes need; nothing is started before `start`.

        Without `launch` another service runs the SuperNode by the saved plan (`run_alone`).
        """
        self._settings = settings
        self._listener = listener
        self._plan = plan
        self._launch_node = launch and plan is not None
        self._stopping = threading.Event()
        self._lock = threading.Lock()
        self._tunnel_ready = threading.Event()
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        self._began: dict[str, float] = {}
        names = ["tunnel"] + (["supernode"] if self._launch_node else [])
        self._loops = {name: Loop(name, functools.partial(self._life, name)) for name in names}

    def start_tunnel(self) -> None:
        """Start the tunnel; it may come up while the model loads."""
        self._loops["tunnel"].start()

    def start_node(self) -> None:
        """Start the SuperNode, if there is a plan for one, as soon as the tunnel is ready.

        A SuperNode that finds nobody backs off for many seconds, so it is worth waiting.
        """
        if self._launch_node:
            self._loops["supernode"].start()

    def _node_left(self) -> None:
        """End the SuperNode that has taken leave; whoever keeps it starts the next one."""
        if self._stopping.is_set() or self._plan is None:
            return
        if not self._launch_node:
            self._plan.save()
            return
        with self._lock:
            node = self._running.get("supernode")
        if node is not None:
            node.terminate()

    def pids(self) -> dict[str, int]:
        """Return the process ids of what runs now, by name."""
        with self._lock:
            return {name: process.pid for name, process in self._running.items()}

    def states(self) -> dict[str, bool]:
        """Return for each process that should run whether it does."""
        running = self.pids()
        return {name: name in running for name in self._loops}

    def problems(self) -> list[str]:
        """What does not run, or has only just been started again, and why, in one line each."""
        found = []
        for name, runs in self.states().items():
            why = self._loops[name].problem()
            young = time.monotonic() - self._began.get(name, 0.0) < _PROVEN_S
            if not runs or (why and young):
                found.append(f"the {name} does not run" + (f": {why}" if why else ""))
        return found

    def stop(self) -> None:
        """End both processes and everything that they started."""
        self._stopping.set()
        for loop in self._loops.values():
            loop.stopping.set()
        self._tunnel_ready.set()
        with self._lock:
            running = [self._running[name] for name in ("supernode", "tunnel") if name in self._running]
        for process in running:
            process.terminate()
        for process in running:
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
        for loop in self._loops.values():
            loop.stop(5)
        self._listener.close()

    def _life(self, name: str) -> float | None:
        """One life of a process, from its start to its end. Raises what kept it from starting, or Ended."""
        if name == "supernode":
            self._tunnel_ready.wait(_TUNNEL_WAIT_S)
        if self._stopping.is_set():
            return None
        process = self._launch(name)
        with self._lock:
            self._running[name] = process
            self._began[name] = time.monotonic()
        if self._stopping.is_set():
            process.terminate()
        last = ""
        try:
            for raw in process.stdout or ():
                line = raw.decode("utf-8", "replace").strip()
                if line == READY:
                    self._tunnel_ready.set()
                elif line == NODE_LEFT:
                    self._node_left()
                elif line:
                    last = line
                    logging.getLogger(f"fl_client.{name}").info(line)
            status = process.wait()
        except BaseException:
            process.terminate()  # nobody would keep it: the next life starts another
            raise
        finally:
            for pipe in (process.stdin, process.stdout):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()
            with self._lock:
                self._running.pop(name, None)
        where = last if last else "see supernode.log in its directory" if name == "supernode" else ""
        raise Ended(f"it ended with status {status}" + (f": {where[:200]}" if where else ""), fix="see its log")

    def _launch(self, name: str) -> subprocess.Popen[bytes]:
        if name == "tunnel":
            kept = {k: v for k, v in os.environ.items() if re.fullmatch(r"(?i)(https|no|all)_proxy|PYTHONPATH", k)}
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", "fl_client.node.tunnel"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                env={**kept, **OFFLINE, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                pass_fds=[self._listener.fileno()],
                start_new_session=True,
            )
            _hand_over(process, self._settings.to_line())
            return process
        if self._plan is None:
            raise RuntimeError("the SuperNode was asked for without a plan")
        return start_node(self._plan, says=subprocess.PIPE)


class Ended(ConcordatError):
    """A helper process ended although it should run."""


def start_node(plan: NodePlan, *, says: int | None = None) -> subprocess.Popen[bytes]:
    """Start the keeper of the confined SuperNode; the caller keeps its standard input open.

    What the keeper itself has to say goes to `says`, as for Popen; the SuperNode writes into its log.
    """
    confinement = node_confinement(plan, free_port())
    process = subprocess.Popen(
        [sys.executable, "-P", "-m", "fl_client.node.sandbox"],  # -P: no module comes from the working directory
        stdin=subprocess.PIPE,
        stdout=says,
        stderr=subprocess.STDOUT if says is not None else None,
        env=keeper_environment(),
        cwd="/",
        start_new_session=True,
        close_fds=True,
    )
    _hand_over(process, confinement.to_line())
    return process


def keeper_environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {**OFFLINE, "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", **({"PYTHONPATH": path} if path else {})}


def _hand_over(process: subprocess.Popen[bytes], line: bytes) -> None:
    """Send the settings; standard input stays open, its end tells the process to stop."""
    if process.stdin is None:
        raise RuntimeError("the helper process has no standard input")
    try:
        process.stdin.write(line)
        process.stdin.flush()
    except BrokenPipeError:
        log.warning("a helper process ended before it took its settings")


def run_alone(directory: Path) -> int:
    """Run the untrusted half by itself until SIGTERM or Ctrl-C; for a service of another user.

    It also ends when the agent writes its plan anew, after its own restart (the tunnel has another
    certificate then) or because the SuperNode has taken leave. The exit status is the SuperNode's; the service
    manager starts it again.
    """
    directory = directory.absolute()
    written = (directory / PLAN_FILE).stat().st_mtime_ns if (directory / PLAN_FILE).exists() else 0
    plan = NodePlan.load(directory)
    log.info("untrusted half: %s", describe_confinement(plan.mode, ""))
    process = start_node(plan)

    def end(_number: int, _frame: FrameType | None) -> None:
        process.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, end)
    status: int | None = None
    while status is None:
        try:
            status = process.wait(1.0)
        except subprocess.TimeoutExpired:
            if (directory / PLAN_FILE).stat().st_mtime_ns != written:
                process.terminate()
    if process.stdin is not None:
        with contextlib.suppress(BrokenPipeError):
            process.stdin.close()
    return min(abs(status), 125)
