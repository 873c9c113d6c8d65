"""Views of a run: its row with rounds and replies, and what a round brings before it is stored."""

from __future__ import annotations

import json
from dataclasses import dataclass, field

from fl_server.db.models import ReplyRow, RoundRow, RunRow
from fl_shared.documents.spec import RunSpec


@dataclass(frozen=True)
class Reply:
    """What one site answered in one round, as it is stored."""

    site: str
    status: str
    code: str = ""
    message: str = ""
    epsilon_spent_total: float = 0.0
    delta: float = 0.0
    document_json: str = ""


@dataclass(frozen=True)
class CommittedRound:
    """The outcome of one aggregation, ready to be stored.

    `attempt`: who computed it. `state`: the server optimizer's, whose digest the adapter's metadata name.
    """

    run: str
    attempt: str
    round: int
    adapter: bytes
    replies: list[Reply]
    received_bytes: int
    seconds: float
    state: bytes = b""


@dataclass(frozen=True)
class RunView:
    """A run with its rounds and replies, read in one transaction. `warnings`: of its launch, told once."""

    row: RunRow
    rounds: list[RoundRow] = field(default_factory=list)
    replies: list[ReplyRow] = field(default_factory=list)
    warnings: tuple[str, ...] = ()

    @property
    def spec(self) -> RunSpec:
        return RunSpec.from_dict(json.loads(self.row.spec_json))

    @property
    def committed(self) -> int:
        return sum(1 for row in self.rounds if row.state == "committed")
