"""Online is one answer: what the SuperLink accepted lately, from an enrolled site; whoever is online is heard of."""

from __future__ import annotations

import time

from hypothesis import given
from hypothesis import strategies as st

from fl_server.control.messages import site_message
from fl_server.db.models import SITE_STATES, SiteRow
from fl_server.identity.presence import ONLINE_S, is_heard, is_online

NOW = 1_000_000.0
AGES = st.floats(0.0, 3 * ONLINE_S) | st.just(NOW)


@given(state=st.sampled_from(SITE_STATES), node=AGES, spoke=AGES)
def test_whoever_is_online_is_enrolled_accepted_by_flower_and_heard(state: str, node: float, spoke: float) -> None:
    """An agent that speaks alone does not make a site online; a node that beats does, whatever the agent says."""
    row = SiteRow(site="h-1", state=state, node_seen_at=NOW - node, last_seen_at=NOW - spoke)
    assert is_online(row, NOW) == (state == "enrolled" and node < ONLINE_S)
    assert is_heard(row, NOW) == (is_online(row, NOW) or spoke < ONLINE_S)
    assert is_heard(row, NOW) or not is_online(row, NOW)


def test_what_an_admin_is_shown_is_the_same_answer() -> None:
    """`sites list` has no rule of its own."""
    for state in SITE_STATES:
        for age in (0.0, 2 * ONLINE_S):
            row = SiteRow(
                site="h-1", state=state, invited_at=1.0, node_seen_at=time.time() - age, last_seen_at=time.time(),
                base_model="", base_targets="", node_id="", signing_key="", certificate_fingerprint="",
                node_key_fingerprint="", enrolled_at=0.0, certificate_expires_at=0.0, revoked_at=0.0,
                base_announced_at=0.0,
            )  # fmt: skip
            assert site_message(row).online == is_online(row)
