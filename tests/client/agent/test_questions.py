"""A plan's question at the site: what is answered, what is not, and that nothing is spent."""

from __future__ import annotations

import dataclasses
import json
import secrets
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Unpack

import pytest

from fl_client.agent.questions import MAX_AT_ONCE, PlanResponder
from fl_shared.documents.plan import Objection, PlanAnswer, PlanQuestion
from fl_shared.errors import BudgetExhausted, ConfigError, SignatureError, TransportError
from fl_shared.identity.signing import SigningKey, open_document, sign_document
from helpers.sites import MODEL, POLICY, SITE, Site, site_spec
from helpers.specs import SpecFields


class Wire:
    """Stands for the gateway: hands out what was asked, keeps what was answered."""

    def __init__(self) -> None:
        self.questions: list[Any] = []
        self.answers: list[dict[str, Any]] = []
        self.broken = False

    def __call__(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]:
        if self.broken:
            raise TransportError("no answer")
        if (method, path) == ("GET", "/v1/questions"):
            return {"questions": self.questions}
        assert (method, path) == ("POST", "/v1/answers")
        assert body is not None
        self.answers.append(body["answer"])
        return {"taken": True}


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Site]:
    """A site with a real ledger."""
    made = Site(tmp_path)
    yield made
    made.ledger.close()


def _question(*, site: str = SITE, age_s: float = 0.0, **fields: Unpack[SpecFields]) -> PlanQuestion:
    now = time.time() - age_s
    return PlanQuestion(secrets.token_hex(16), site, site_spec(**fields), now, now + 20)


def _asked(site: Site, question: PlanQuestion, key: SigningKey | None = None) -> PlanAnswer:
    responder = PlanResponder(Wire(), site.facts, site.outgoing)
    sealed = responder.answer(sign_document(key or site.coordinator, question.to_dict()))
    assert sealed.payload == b""
    answer = PlanAnswer.from_dict(open_document(json.loads(sealed.document), site.key.public_hex))
    assert (answer.question, answer.question_digest, answer.site) == (question.question, question.digest, SITE)
    return answer


def test_the_answer_says_exactly_how_many_rounds_the_ledger_grants(site: Site) -> None:
    """The rounds that were told are granted one after another, and not one more; asking spent nothing."""
    question = _question(rounds=100_000, noise_multiplier=0.8, sampling_probability=0.1, steps_per_round=10)
    before = site.ledger.head()
    answer = _asked(site, question)
    assert site.ledger.head() == before
    assert 0 < answer.rounds_affordable < answer.rounds_asked
    assert [each.code for each in answer.objections] == ["budget-exhausted"]
    for number in range(1, answer.rounds_affordable + 1):
        site.ledger.reserve("records", question.spec.mechanism(), run="demo-1", round=number)
    with pytest.raises(BudgetExhausted):
        site.ledger.reserve("records", question.spec.mechanism(), run="demo-1", round=number + 1)
    assert _asked(site, question).rounds_affordable == 0


def test_the_noise_that_is_told_makes_all_rounds_fit(site: Site) -> None:
    """A plan that does not fit comes with a noise multiplier at which it does; one that fits comes without."""
    answer = _asked(site, _question(rounds=2000))
    assert answer.noise_that_fits > 1.0
    again = _asked(site, _question(rounds=2000, noise_multiplier=answer.noise_that_fits))
    assert (again.objections, again.noise_that_fits) == ((), 0.0)
    assert again.rounds_affordable >= 2000


def test_every_objection_of_the_policy_is_named(site: Site) -> None:
    """Noise, clipping, sampling, steps and base model: each has its own line, and no round would pass."""
    question = _question(noise_multiplier=0.6, clipping_norm=3.0, sampling_probability=0.5, steps_per_round=90)
    other = dataclasses.replace(question.spec.run, base_model="sha256:" + "2" * 64)
    question = dataclasses.replace(question, spec=dataclasses.replace(question.spec, run=other))
    told = [str(each) for each in _asked(site, question).objections]
    named = ("noise_multiplier 0.6 < 0.8", "clipping_norm 3 > 1", "sampling_probability 0.5 >", "steps_per_round 90 >")
    for text in named:
        assert any(line.startswith(f"policy: {text}") for line in told), told
    assert any(line.startswith("unknown-base-model: ") and MODEL in line for line in told)


def test_a_budget_outside_its_period_affords_nothing(tmp_path: Path) -> None:
    """Before `valid_from` no round is affordable, and the reason says so."""
    import datetime as dt

    site = Site(tmp_path)
    later = dt.datetime.now(dt.UTC) + dt.timedelta(days=3)
    site.ledger.set_budget("records", site.epsilon, 1e-5, "officer", valid_from=later)
    answer = _asked(site, _question())
    assert answer.rounds_affordable == 0
    assert "is valid from" in answer.objections[0].message
    site.ledger.close()


def test_an_objection_is_one_of_the_known_kinds() -> None:
    """What a site cannot say is refused when it is read: another code, no message, too much text."""
    for text in ("because", "secret: the patient", "policy:x", "policy: " + "x" * 600, 7):
        with pytest.raises(ConfigError):
            Objection.parse(text)
    assert Objection.parse(str(Objection("policy", "a\nb\x1b[2J"))).message == "a b\\x1b[2J"


@pytest.mark.parametrize("case", ["key", "site", "old", "future", "changed", "nonsense"])
def test_a_question_that_is_not_the_coordinators_gets_no_answer(site: Site, case: str) -> None:
    """Wrong signer, other site, other time, changed body, no question at all: nothing is said."""
    age_s = {"old": 60.0, "future": -9000.0}.get(case, 0.0)
    question = _question(site="hospital-002" if case == "site" else SITE, age_s=age_s)
    document: Any = sign_document(SigningKey.generate() if case == "key" else site.coordinator, question.to_dict())
    if case == "changed":
        document["body"]["spec"]["run"]["rounds"] = 1
    with pytest.raises((SignatureError, ConfigError)):
        PlanResponder(Wire(), site.facts, site.outgoing).answer([document] if case == "nonsense" else document)


def test_each_question_is_answered_once_and_bad_ones_do_not_stop_the_rest(site: Site) -> None:
    """One look answers what can be answered, at most eight; the next look answers nothing twice."""
    wire = Wire()
    responder = PlanResponder(wire, site.facts, site.outgoing)
    wire.questions = ["nonsense", {"key": 1, "x": float("nan")}]
    wire.questions += [sign_document(site.coordinator, _question().to_dict()) for _ in range(2)]
    responder.look()
    responder.look()
    assert len(wire.answers) == 2
    wire.questions = [sign_document(site.coordinator, _question().to_dict()) for _ in range(MAX_AT_ONCE + 4)]
    responder.look()
    assert len(wire.answers) == 2 + MAX_AT_ONCE


def test_an_answer_that_was_lost_is_brought_again(site: Site) -> None:
    """A gateway that breaks off does not cost the question its answer."""
    wire = Wire()
    responder = PlanResponder(wire, site.facts, site.outgoing)
    wire.questions = [sign_document(site.coordinator, _question().to_dict())]
    wire.broken = True
    assert responder.look() > 10
    wire.broken = False
    responder.look()
    assert len(wire.answers) == 1


def test_a_site_that_answers_no_plans_does_not_even_look(site: Site) -> None:
    """With `answer_plans = false` the gateway is never called; with true it is, at once."""
    for told, wanted in ((True, 1), (False, 0)):
        looks: list[str] = []

        def call(method: str, path: str, body: Any = None, looks: list[str] = looks) -> dict[str, Any]:
            looks.append(path)
            return {"questions": []}

        facts = dataclasses.replace(site.facts, policy=dataclasses.replace(POLICY, answer_plans=told))
        responder = PlanResponder(call, facts, site.outgoing)
        responder.start()
        time.sleep(0.3)
        responder.stop()
        assert len(looks) == wanted


def test_a_question_that_breaks_the_answer_ends_no_thread(site: Site, monkeypatch: pytest.MonkeyPatch) -> None:
    """Signed numbers of every extreme, and a defect in the answer itself: the thread goes on and answers the next."""
    wire = Wire()
    broken = _question()
    answer = site.outgoing.plan

    def plan(question: PlanQuestion, *more: Any) -> Any:
        if question.question == broken.question:
            raise ZeroDivisionError
        return answer(question, *more)

    monkeypatch.setattr(site.outgoing, "plan", plan)
    extremes = []
    for field, values in {
        "noise_multiplier": (1e-200, 5e-324, float("nan"), float("inf"), 1e308, 1e-4, 1e6, 0, -1),
        "sampling_probability": (0, 5e-324, 1e-9, 1, float("nan"), 1 - 1e-16),
        "steps_per_round": (1, 1_000_000, 10**30),
        "clipping_norm": (0, 1e-300, 1e308),
    }.items():
        for value in values:
            body = _question().to_dict()
            body["question"] = secrets.token_hex(16)
            body["spec"]["training"][field] = value
            extremes.append(body)
    signed = []
    for body in (broken.to_dict(), *extremes):
        try:
            signed.append(sign_document(site.coordinator, body))
        except ConfigError:  # NaN has no canonical form, so nobody can have signed it
            signed.append({"body": body, "key": site.coordinator.public_hex, "signature": "0" * 128})
    last = sign_document(site.coordinator, _question().to_dict())
    responder = PlanResponder(wire, site.facts, site.outgoing)
    for at in range(0, len(signed), MAX_AT_ONCE - 1):
        wire.questions = [*signed[at : at + MAX_AT_ONCE - 1], last]
        responder.look()
    told = [each["body"]["question"] for each in wire.answers]
    assert last["body"]["question"] in told
    assert broken.question not in told
    assert len(told) >= 6  # the extremes that lie within the bounds are answered, in finite numbers
    monkeypatch.setattr(responder, "look", lambda: 1 / 0)
    monkeypatch.setattr("fl_client.agent.questions.RETRY_S", 0.01)
    responder.start()
    time.sleep(0.2)
    assert responder.loop._thread.is_alive()
    responder.stop()


def test_a_plan_names_what_the_base_lacks_and_what_is_suspended(site: Site) -> None:
    """Both are said before a launch, typed."""
    site.facts = dataclasses.replace(site.facts, targets=("routed_experts",))
    held = site.ledger.reserve("records", _question().spec.mechanism(), run="demo", round=1)
    site.ledger.charge_in_doubt(held, "EngineError after private data was read")
    told = _asked(site, _question()).objections
    assert {each.code for each in told} == {"unsupported-spec", "suspended"}
    assert any("no attention" in each.message for each in told)
