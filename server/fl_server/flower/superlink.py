"""The only module that talks to Flower's SuperLink from outside: through `flwr`'s own commands, on loopback.

Flower's Control API asks for no credential, so nothing but this machine may reach it; see docs/security.md.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import socket
import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

from fl_server.home.layout import ServerHome
from fl_shared.errors import ConcordatError, RunError, TransportError
from fl_shared.files import sqlite_url, write_durably
from fl_shared.runtime.offline import OFFLINE
from fl_shared.wire.hosts import is_proxy_variable

CONNECTION = "concordat"
COMMAND_TIMEOUT_S = 90.0


def environment(home: ServerHome) -> dict[str, str]:
    """The environment of our processes and Flower's: private FLWR_HOME, no proxy, nothing is sent to Flower Labs."""
    inherited = {
        k: v for k, v in os.environ.items() if not k.startswith(("FLWR_", "FL_")) and not is_proxy_variable(k)
    }  # everything that these processes call is on loopback
    return inherited | {
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), inherited.get("PATH", "/usr/bin:/bin")]),
        "FLWR_HOME": str(home.flower / "home"),
        **OFFLINE,
        "PYTHONUNBUFFERED": "1",
        "OMP_NUM_THREADS": "1",
    }


def script(name: str) -> str:
    """A console script of this Python environment."""
    return str(Path(sys.executable).parent / name)


def _toml(value: str) -> str:
    """A TOML string without a quote inside: Flower looks for the next one before it reads TOML."""
    return '"' + json.dumps(value)[1:-1].replace('\\"', "\\u0022") + '"'


class Flower:
    """Commands to the SuperLink of one coordinator home."""

    def __init__(self, home: ServerHome) -> None:
        self._home = home

    def _state(self, name: str) -> str:
        try:
            return str(json.loads(self._home.flower_state.read_text("utf-8"))[name])
        except (OSError, ValueError, KeyError) as error:
            raise TransportError("no SuperLink was started here", fix="run `fl-server up`") from error

    def address(self) -> str:
        """`127.0.0.1:PORT` of the SuperLink that runs now; TransportError when none was started."""
        return self._state("address")

    def started(self) -> str:
        """16 hex digits that are others after every start of the SuperLink."""
        return self._state("started")

    def answers(self) -> bool:
        """Whether the SuperLink's port takes connections; TransportError when none was started."""
        host, _, port = self.address().partition(":")
        try:
            with socket.create_connection((host, int(port)), timeout=1.0):
                return True
        except OSError:
            return False

    def configure(self, port: int) -> None:
        """Point `flwr` and the gateway at the SuperLink on this loopback port."""
        address = f"127.0.0.1:{port}"
        text = (
            f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\naddress = "{address}"\n'
            f"root-certificates = {json.dumps(str(self._home.ca))}\n"
        )
        write_durably(self._home.flower / "home" / "config.toml", text.encode())
        state = {"address": address, "started": secrets.token_hex(8)}
        write_durably(self._home.flower_state, json.dumps(state).encode())

    @property
    def _database(self) -> Path:
        return self._home.flower / "superlink.db"

    def damaged(self) -> bool:
        """Whether the SuperLink's database cannot be used: no SQLite file, inconsistent, or without its nodes."""
        if not self._database.exists():
            return self._database.is_symlink()  # to nowhere: SQLite makes no file through it
        try:
            with contextlib.closing(sqlite3.connect(self._database, timeout=10.0)) as database:
                tables = {str(name) for (name,) in database.execute("SELECT name FROM sqlite_master")}
                checked = database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.DatabaseError as error:
            primary = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_CORRUPT) & 0xFF
            return primary not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED)
        return checked != ("ok",) or bool(tables and not {"alembic_version", "node"} <= tables)

    def set_aside(self) -> bool:
        """Move a database that is damaged, or to be made again, out of the way of the next start; whether it was."""
        requested = self._home.rebuild_wanted.exists()
        if not requested and not self.damaged():
            return False
        aside = self._home.flower / "aside"
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True, mode=0o700)
        for place in self._home.flower.glob("superlink.db*"):
            place.rename(aside / place.name)
        self._home.rebuild_wanted.unlink(missing_ok=True)
        return True

    def want_rebuild(self) -> None:
        """Ask the supervisor for a SuperLink with an empty database; `rounds.nodes` registers the nodes again."""
        write_durably(self._home.rebuild_wanted, b"")

    def rebuild_wanted(self) -> bool:
        """Whether somebody asked for it."""
        return self._home.rebuild_wanted.exists()

    def doubt(self, doubted: bool) -> None:
        """Note that the SuperLink refused a node that is enrolled here, or that this was looked into."""
        if doubted:
            write_durably(self._home.node_doubted, b"")
        else:
            self._home.node_doubted.unlink(missing_ok=True)

    def doubted(self) -> bool:
        """Whether a node of ours was refused since the last look."""
        return self._home.node_doubted.exists()

    def superlink_command(self, port: int) -> list[str]:
        """The command line of the SuperLink."""
        return [
            script("flower-superlink"), "--host", "127.0.0.1", "--port", str(port),
            "--enable-supernode-auth", "--disable-runtime-dependency-installation",
            "--database", sqlite_url(self._database),  # a bare path would end at its first question mark
            "--ssl-certfile", str(self._home.server_certificate),
            "--ssl-keyfile", str(self._home.server_key),
            "--ssl-ca-certfile", str(self._home.ca),
        ]  # fmt: skip

    def _flwr(self, *arguments: str) -> dict[str, Any]:
        try:
            ended = subprocess.run(
                [script("flwr"), *arguments, "--format", "json"],
                env=environment(self._home),
                capture_output=True,
                text=True,
                timeout=COMMAND_TIMEOUT_S,
                check=False,
                stdin=subprocess.DEVNULL,
            )
        except subprocess.TimeoutExpired as error:
            raise TransportError(
                f"`flwr {arguments[0]}` gave no answer in {COMMAND_TIMEOUT_S:.0f} s", fix="see logs/superlink.log"
            ) from error
        start = ended.stdout.find("{")
        try:
            answer = json.loads(ended.stdout[start:])
        except ValueError as error:
            tail = (ended.stdout + ended.stderr).strip()[-400:]
            raise TransportError(
                f"`flwr {' '.join(arguments[:2])}` failed: {tail}", fix="see logs/superlink.log"
            ) from error
        if not isinstance(answer, dict):
            raise TransportError(f"`flwr {arguments[0]}` printed no object", fix="see logs/superlink.log")
        return answer

    def register_node(self, public_key: str, name: str) -> str | None:
        """Allow a node key; its node id, or None when the SuperLink knows the key already."""
        place = self._home.flower / "node_keys" / f"{name}.pub"
        write_durably(place, public_key.strip().encode() + b"\n")
        answer = self._flwr("supernode", "register", str(place), CONNECTION, "--name", name)
        if answer.get("success"):
            return str(answer["node-id"])
        message = str(answer.get("error-message", ""))
        if "already in use" in message:
            return None
        raise TransportError(
            f"Flower did not register the node key: {message.strip()[-200:]}", fix="see logs/superlink.log"
        )

    def unregister_node(self, node_id: str) -> None:
        """Forbid a node; TransportError when the SuperLink does not answer. An unknown node is no error."""
        self._flwr("supernode", "unregister", node_id, CONNECTION)

    def nodes(self) -> dict[str, str]:
        """Node id to Flower's status: registered, online, offline or unregistered."""
        answer = self._flwr("supernode", "list", CONNECTION)
        return {str(node["node-id"]): str(node["status"]) for node in answer.get("nodes", [])}

    def start_run(self, app: Path, config: dict[str, str]) -> str:
        """Start a Flower run; its id."""
        pairs = " ".join(f"{key}={_toml(value)}" for key, value in config.items())
        answer = self._flwr("run", str(app), CONNECTION, "--run-config", pairs)
        if not answer.get("success"):
            raise RunError(
                f"Flower did not start the run: {str(answer.get('error-message', answer))[-400:]}",
                fix="see logs/superlink.log",
            )
        return str(answer["run-id"])

    def run_status(self, run_id: str) -> str:
        """Flower's status of one run; `unknown` when the SuperLink does not have it."""
        answer = self._flwr("list", CONNECTION, "--run-id", run_id)
        runs = answer.get("runs", [])
        return str(runs[0]["status"]) if runs else "unknown"

    def stop_run(self, run_id: str) -> None:
        """Ask Flower to end a run; one that has ended already is no error."""
        try:
            self._flwr("stop", run_id, CONNECTION)
        except ConcordatError as error:
            if "finished" not in error.message:
                raise
