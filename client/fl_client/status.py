"""`fl-client status`: what can be said about a site without starting anything."""

from __future__ import annotations

from typing import Any

import grpc

from fl_client.config import SiteConfig
from fl_client.enrolment import Coordinator
from fl_client.home import SiteHome
from fl_shared.errors import ConcordatError, EnrolmentError
from fl_shared.ledger.service import Ledger
from fl_shared.wire import agent_pb2_grpc
from fl_shared.wire.agent_pb2 import InfoReply, InfoRequest


def status_of(home: SiteHome, site: str) -> dict[str, Any]:
    """Return enrolment, the agent's state and the ledger's position of `site`, as plain JSON values."""
    found: dict[str, Any] = {"site": site, "home": str(home.root)}
    try:
        found["enrolled"] = Coordinator.load(home).server
    except EnrolmentError:
        found["enrolled"] = "no"
    found["agent"] = agent_state(home)
    try:
        config = SiteConfig.load(home, site)
        ledger = Ledger.open(config.ledger_url, None, site)
        try:
            position = ledger.epsilon(config.data.name)
            found["budget"] = {
                "dataset": config.data.name,
                "spent": position.spent,
                "reserved": position.reserved,
                "left": position.left,
                "epsilon": position.epsilon,
                "delta": position.delta,
            }
            found["runs"] = len({spend.reservation.run for spend in ledger.spends()})
        finally:
            ledger.close()
    except ConcordatError as error:
        found["budget"] = f"unknown: {error.message}"
    return found


def agent_state(home: SiteHome) -> str:
    """Return `idle` or `training` as the running agent says, `stopped` when none answers."""
    if not home.socket.exists():
        return "stopped"
    with grpc.insecure_channel(f"unix:{home.socket}") as channel:
        stub = agent_pb2_grpc.AgentStub(channel)
        try:
            reply: InfoReply = stub.Info(InfoRequest(), timeout=3)
        except grpc.RpcError:
            return "stopped"
    return str(reply.state)
