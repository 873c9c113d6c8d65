"""Tell the coordinator which base model the site has, so that a run that does not fit it is not launched.

A thread of the agent says it at the start and every few minutes (`POST /v1/base`, over mutual TLS): a coordinator that
was restored from a backup knows it again soon. It is a hint. What a round may do is still decided here.
"""

from __future__ import annotations

import logging

from fl_client.agent.questions import RETRY_S, Call
from fl_shared.documents.base_model import BaseModel
from fl_shared.errors import ConcordatError
from fl_shared.runtime.threads import Loop

log = logging.getLogger("fl_client.announcement")

EVERY_S = 300.0


class Announcer:
    """A thread of the agent that announces the base model."""

    def __init__(self, call: Call, base: BaseModel) -> None:
        """Take the way to the gateway, and what to say."""
        self._call = call
        self._base = base
        self._reached = True
        self.loop = Loop("the announcement of the base model", lambda: self.tell(), most_pause_s=2 * RETRY_S)

    def tell(self) -> float:
        """Say it; the seconds until it is said again."""
        try:
            self._call("POST", "/v1/base", self._base.to_dict())
        except ConcordatError as error:
            if self._reached:  # once, not every few seconds
                log.warning("cannot tell the coordinator which base model this site has: %s", error.message)
            self._reached = False
            return RETRY_S
        self._reached = True
        return EVERY_S
