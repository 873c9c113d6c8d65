"""Follow the coordinator's change of its signing key, with a grace period, and never by its mere word.

Enrolment pins one key. A new one is believed only with a document that the pinned key signed:

    {"kind": "coordinator-key", "new_key": hex, "created_at": s, "old_until": s}

The gateway hands out its documents, oldest first, in `/v1/hello` under `rotations`. The site follows the chain,
writes the new pin and the old key's last day durably, and accepts orders of the old key until then.

A key that was stolen ends with such a document, so whoever holds it would keep the document from the site. Therefore
a key is accepted only for `VOUCHED_S` after the gateway, over TLS that the pinned CA vouches for, has last named it
as the one in use: a site that gets orders but hears nothing refuses them (decision 0090).
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import math
import threading
import time
from typing import Any

from fl_client.identity.enrolment import Coordinator
from fl_client.identity.gateway import GatewayClient
from fl_client.site.home import SiteHome
from fl_shared.documents.rotation import CoordinatorKey
from fl_shared.errors import ConcordatError, EnrolmentError
from fl_shared.identity.signing import ed25519_key, open_document

log = logging.getLogger("fl_client.identity.rotation")

ASK_EVERY_S = 60.0
ASK_AGAIN_S = 3.0
VOUCH_EVERY_S = 300.0
VOUCHED_S = 3600.0
MAX_GRACE_S = 90 * 86_400.0
MAX_ROTATIONS = 1000
_FIX = "compare the coordinator's key with its administrator by telephone; after a loss of the old key enrol again"


def follow(pinned: Coordinator, rotations: Any, now: float) -> Coordinator:
    """Return what is pinned after `rotations`; the same object when none of them starts at the pinned key.

    Raises EnrolmentError when a document claims the pinned key but its signature or form is wrong.
    """
    if not isinstance(rotations, list) or len(rotations) > MAX_ROTATIONS:
        raise EnrolmentError("the coordinator's list of key changes is malformed", fix=_FIX)
    for document in rotations:
        if not isinstance(document, dict) or document.get("key") != pinned.coordinator_key:
            continue
        try:
            change = CoordinatorKey.from_dict(open_document(document, pinned.coordinator_key))
            ed25519_key(change.new_key)
        except ConcordatError as error:
            raise EnrolmentError(f"a change of the coordinator's key is not valid: {error.message}", fix=_FIX) from None
        pinned = dataclasses.replace(
            pinned,
            coordinator_key=change.new_key,
            previous_key=pinned.coordinator_key,
            # By both clocks: a site whose own is behind would go on accepting a key that was ended without a grace.
            previous_until=min(change.old_until, now + min(change.old_until - change.created_at, MAX_GRACE_S)),
        )
    return pinned


class PinnedKeys:
    """Which signing keys orders may come from, now. Safe to use from several threads."""

    def __init__(self, home: SiteHome, pinned: Coordinator) -> None:
        """Start from what enrolment (or an earlier rotation) pinned."""
        self._home = home
        self._pinned = pinned
        self._lock = threading.Lock()
        self._asked = {True: -math.inf, False: -math.inf}  # for a key that is known, and for one that is not
        self._vouched = -math.inf

    def accepts(self, key: str) -> bool:
        """Whether `key` may sign orders: it is pinned, and the gateway has named it in the last `VOUCHED_S`.

        An unknown key makes the site ask for a rotation, once a minute at most; a known one every `VOUCH_EVERY_S`.
        """
        with self._lock:
            known, now = self._known(key), _uptime()
            overdue = not known or now - self._vouched > VOUCH_EVERY_S
            if overdue and now - self._asked[known] >= (ASK_AGAIN_S if known else ASK_EVERY_S):
                self._asked[known] = now
                self._refresh()
            if self._known(key) and now - self._vouched > VOUCHED_S:
                log.warning("orders are refused: the gateway has not confirmed the coordinator's key lately")
                return False
            return self._known(key)

    def _known(self, key: str) -> bool:
        pinned = self._pinned
        if pinned.previous_key and time.time() >= pinned.previous_until:
            # For good, and on disk: a clock that is set back must not bring an ended key back.
            pinned = dataclasses.replace(pinned, previous_key="", previous_until=0.0)
            self._pinned = pinned
            with contextlib.suppress(OSError):  # a full disk: written with the next change, or after the next start
                pinned.save(self._home)
        return bool(key) and key in (pinned.coordinator_key, pinned.previous_key)

    def _refresh(self) -> None:
        try:
            answer = GatewayClient.of_site(self._home, self._pinned.server).hello()
            changed = follow(self._pinned, answer.get("rotations", []), time.time())
        except ConcordatError as error:
            log.warning("cannot ask for the coordinator's keys: %s", error.message)
            return
        if changed is not self._pinned:
            changed.save(self._home)
            self._pinned = changed
            log.warning("the coordinator's key is now %s, vouched for by the former one", changed.coordinator_key)
        if answer.get("coordinator_key") == changed.coordinator_key:
            self._vouched = _uptime()
        else:
            log.warning("the gateway names another key than the pinned one, and nothing vouches for it")


def _uptime() -> float:
    """Seconds that go on while the machine sleeps and that no clock setting changes."""
    return time.clock_gettime(time.CLOCK_BOOTTIME)
