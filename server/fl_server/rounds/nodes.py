"""Keeps the SuperLink's list of nodes in step with ours: it may lose its database, we may not lose a site.

Which site may speak is stored in our own SQL; Flower's `superlink.db` holds a copy of it and nothing else that is
needed after a restart. So a node that the SuperLink does not know is registered again, under the new id that it gives,
and a `superlink.db` that is damaged, or that will not have a node back, is set aside and made again (decision 0089).
"""

from __future__ import annotations

import logging
import time

from fl_server.flower.superlink import Flower
from fl_server.identity.sites import Sites
from fl_shared.errors import TransportError

log = logging.getLogger("fl_server.rounds.launcher")

PAUSE_S = 10.0
GONE = "unregistered"


class Nodes:
    """Looks after every start of the SuperLink, and whenever it has refused an enrolled site's node."""

    def __init__(self, sites: Sites, flower: Flower) -> None:
        self._sites = sites
        self._flower = flower
        self._checked = ""
        self._not_before = 0.0

    def tick(self) -> None:
        """Look, if there is a reason to; TransportError when the SuperLink does not answer."""
        started, now = self._flower.started(), time.monotonic()
        if now < self._not_before or (started == self._checked and not self._flower.doubted()):
            return
        if not self._flower.answers():
            return
        self._not_before = now + PAUSE_S
        self._flower.doubt(False)
        try:
            self._register_nodes()
        except TransportError:
            if self._flower.damaged():
                self._flower.want_rebuild()
            self._flower.doubt(True)
            raise
        self._checked = started

    def _register_nodes(self) -> None:
        known = self._flower.nodes()
        for row in self._sites.all():
            status = known.get(row.node_id, GONE)
            if row.state == "revoked" and status != GONE:
                self._flower.unregister_node(row.node_id)
            if row.state != "enrolled" or status != GONE or not row.node_public_key:
                continue
            node_id = self._flower.register_node(row.node_public_key, row.site)
            if node_id is None:
                log.warning("the SuperLink will not have the node of %s back", row.site)
                self._flower.want_rebuild()
                return
            self._sites.moved(row.site, row.node_public_key, node_id)
            log.warning("the SuperLink did not know the node of %s; it is registered again as %s", row.site, node_id)
