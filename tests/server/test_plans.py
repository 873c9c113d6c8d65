"""Plans in SQL, on SQLite and on PostgreSQL: who is asked, who may answer, and until when."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest

from fl_server.db.models import QuestionRow, SiteRow
from fl_server.db.store import Store
from fl_server.runs.plans import KEPT_S, Plan, Plans
from fl_shared.documents.plan import Objection, PlanAnswer, PlanQuestion
from fl_shared.errors import ConfigError, SignatureError
from fl_shared.identity.signing import SigningKey, open_document, sign_document
from helpers.specs import run_spec

COORDINATOR = SigningKey.generate()
KEYS = {site: SigningKey.generate() for site in ("h-1", "h-2")}
STATES = {"h-1": "enrolled", "h-2": "enrolled", "h-3": "invited", "h-4": "revoked"}


@pytest.fixture
def plans(store: Store) -> Plans:
    """The service, with two enrolled sites, one invited and one revoked; h-2 was heard of long ago."""
    with store.write() as session:
        for site, state in STATES.items():
            key = KEYS[site].public_hex if site in KEYS else ""
            seen = time.time() if site == "h-1" else 1000.0
            session.add(SiteRow(site=site, state=state, invited_at=1.0, signing_key=key, last_seen_at=seen))
    return Plans(store)


def _ask(plans: Plans, *sites: str, wait_s: float = 30.0) -> Plan:
    spec = run_spec(sites=sites, rounds=5)
    return plans.ask(spec, COORDINATOR, wait_s)


def _answer(document: Any, key: SigningKey, **changes: Any) -> dict[str, Any]:
    question = PlanQuestion.from_dict(open_document(document, COORDINATOR.public_hex))
    body = PlanAnswer(question.question, question.digest, question.site, 5, 7, 0.0, (), 1.0).to_dict()
    return sign_document(key, body | changes)


def test_only_enrolled_sites_are_asked_each_its_own_question(plans: Plans) -> None:
    """The others are named with the reason; nobody sees another site's question."""
    plan = _ask(plans, "h-1", "h-2", "h-3", "h-4", "h-9")
    assert plan.asked == ("h-1", "h-2")
    assert [(each.site, each.status) for each in plan.not_asked] == [
        (site, "not-enrolled") for site in ("h-3", "h-4", "h-9")
    ]
    for site in plan.asked:
        (document,) = plans.pending(site)
        question = PlanQuestion.from_dict(open_document(document, COORDINATOR.public_hex))
        assert (question.site, question.spec.run.name) == (site, "demo")
    assert plans.pending("h-9") == []


def test_the_first_answer_counts_and_the_question_is_gone(plans: Plans) -> None:
    """A second answer changes nothing; the plan sees what the site signed."""
    plan = _ask(plans, "h-1", "h-2")
    (document,) = plans.pending("h-1")
    first = _answer(document, KEYS["h-1"])
    plans.take("h-1", first)
    plans.take("h-1", _answer(document, KEYS["h-1"], objections=[str(Objection("policy", "no"))]))
    assert plans.pending("h-1") == []
    found = plans.answers(plan)
    assert {site: view.status for site, view in found.items()} == {"h-1": "affordable"}
    assert json.loads(found["h-1"].answer_json) == first


def test_an_objection_makes_it_a_refusal(plans: Plans) -> None:
    """One objection is enough."""
    plan = _ask(plans, "h-2")
    told = str(Objection("budget-exhausted", "2 of 5 rounds fit"))
    plans.take("h-2", _answer(plans.pending("h-2")[0], KEYS["h-2"], objections=[told], rounds_affordable=2))
    view = plans.answers(plan)["h-2"]
    assert view.answer is not None
    assert (view.status, view.answer.rounds_affordable, str(view.answer.objections[0])) == ("refused", 2, told)


def test_a_question_that_is_over_cannot_be_answered(plans: Plans, store: Store) -> None:
    """After its time a question is neither handed out nor answered; a day later it is deleted."""
    _ask(plans, "h-1")
    (document,) = plans.pending("h-1")
    with store.write() as session:
        session.query(QuestionRow).update({"expires_at": time.time() - 1})
    assert plans.pending("h-1") == []
    with pytest.raises(ConfigError, match="no such question"):
        plans.take("h-1", _answer(document, KEYS["h-1"]))
    with store.write() as session:
        session.query(QuestionRow).update({"expires_at": time.time() - KEPT_S - 1})
    _ask(plans, "h-2")
    with store.read() as session:
        assert session.query(QuestionRow).count() == 1


def test_what_another_site_or_key_says_is_not_an_answer(plans: Plans) -> None:
    """Wrong key, wrong site, wrong question, no document."""
    _ask(plans, "h-1", "h-2")
    (document,) = plans.pending("h-1")
    (other,) = plans.pending("h-2")
    digest = _answer(other, KEYS["h-2"])["body"]["question_digest"]
    for sender, wrong in (
        ("h-2", _answer(document, KEYS["h-2"])),
        ("h-1", _answer(document, KEYS["h-2"])),
        ("h-1", _answer(document, KEYS["h-1"], site="h-2")),
        ("h-1", _answer(document, KEYS["h-1"], question_digest=digest)),
        ("h-1", _answer(document, KEYS["h-1"], rounds_affordable=-1)),
        ("h-1", {"body": {"question": [1]}}),
        ("h-1", []),
    ):
        with pytest.raises((ConfigError, SignatureError)):
            plans.take(sender, wrong)
    assert len(plans.pending("h-1")) == 1


def test_a_silent_site_is_online_or_not(plans: Plans) -> None:
    """Heard of just now: silent; long ago or never: not online."""
    assert [plans.silent(site).status for site in ("h-1", "h-2", "h-9")] == ["silent", "not-online", "not-online"]


@pytest.mark.parametrize("wait_s", [0.5, 601.0, -1.0, float("nan")])
def test_a_wait_out_of_bounds_is_refused(plans: Plans, wait_s: float) -> None:
    """A plan waits 1 s to 10 minutes."""
    with pytest.raises(ConfigError, match="is refused"):
        _ask(plans, "h-1", wait_s=wait_s)
