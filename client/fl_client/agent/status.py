"""`fl-client status`: what can be said about a site without starting anything."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import grpc

from fl_client.agent.progress import read_progress
from fl_client.identity.enrolment import Coordinator
from fl_client.site.config import SiteConfig
from fl_client.site.home import SiteHome
from fl_shared.errors import ConcordatError, EnrolmentError
from fl_shared.files import socket_address
from fl_shared.ledger.service import Ledger
from fl_shared.ledger.suspension import Suspensions
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import InfoReply, InfoRequest


def status_of(home: SiteHome, site: str) -> dict[str, Any]:
    """Return enrolment, the agent's state and the ledger's position of `site`, as plain JSON values."""
    status: dict[str, Any] = {"site": site, "home": str(home.root)}
    try:
        status["enrolled"] = Coordinator.load(home).server
    except EnrolmentError:
        status["enrolled"] = "no"
    try:
        config = SiteConfig.load(home, site)
        status["agent"] = agent_state(home, config.supernode.socket)
        if status["agent"] == "training" and (progress := read_progress(home.progress)):
            status["training"] = progress
        if status["agent"] != "stopped":
            status["problems"] = agent_problems(config.supernode.socket)
        ledger = Ledger.open(config.ledger_url, None, site)
        try:
            position = ledger.epsilon(config.data.name)
            status["budget"] = {
                "dataset": config.data.name,
                "spent": position.spent,
                "reserved": position.reserved,
                "left": position.left,
                "epsilon": position.epsilon,
                "delta": position.delta,
            }
            status["suspended"] = Suspensions(ledger).all()
            status["runs"] = len({spend.reservation.run for spend in ledger.spends()})
        finally:
            ledger.close()
    except ConcordatError as error:
        status.setdefault("agent", agent_state(home))
        status["budget"] = f"unknown: {error.message}"
    return status


def agent_state(home: SiteHome, socket: Path | None = None) -> str:
    """Return `idle` or `training` as the agent at `socket` says, by default the home's; `stopped` when none answers."""
    reply = _info(socket or home.socket)
    return str(reply.state) if reply else "stopped"


def agent_problems(socket: Path) -> list[str]:
    """What the agent at `socket` says does not run, and why; nothing when no agent answers."""
    reply = _info(socket)
    return [str(problem) for problem in reply.problems] if reply else []


def _info(socket: Path) -> InfoReply | None:
    if not socket.exists():
        return None
    with grpc.insecure_channel(f"unix:{socket_address(socket)}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        try:
            reply: InfoReply = stub.Info(InfoRequest(), timeout=3)
        except grpc.RpcError:
            return None
    return reply
