"""Answer the coordinator's plans: would this site take part in a run, and for how many rounds?

A thread of the agent looks for questions every few seconds (`GET /v1/questions`, over mutual TLS), checks each as it
would check an order, and brings its answer (`POST /v1/answers`). `[policy] answer_plans = false` ends all of this.
Answers pass `agent.outgoing`; they depend on the policy, the base model's digest and the ledger, never on data.
"""

from __future__ import annotations

import json
import logging
import time
from collections import OrderedDict
from typing import Any, Protocol

from fl_client.agent.outgoing import Outgoing, Sealed
from fl_client.agent.policy import refusals
from fl_client.agent.rounds import CLOCK_SKEW_S, SUSPENDED, SiteFacts
from fl_shared.canonical import canonical_bytes, sha256_hex
from fl_shared.documents.plan import Objection, PlanQuestion
from fl_shared.errors import ConcordatError, ConfigError, SignatureError
from fl_shared.identity.signing import open_document
from fl_shared.runtime.threads import Loop

log = logging.getLogger("fl_client.questions")

EVERY_S = 3.0
RETRY_S = 15.0
MAX_AT_ONCE = 8
REMEMBERED = 1000


class Call(Protocol):
    """One call of the gateway; TransportError or EnrolmentError without an answer (`GatewayClient.call`)."""

    def __call__(self, method: str, path: str, body: dict[str, Any] | None = None) -> dict[str, Any]: ...


class PlanResponder:
    """A thread of the agent that answers plans."""

    def __init__(self, call: Call, facts: SiteFacts, outgoing: Outgoing) -> None:
        """Take the way to the gateway, what the site is, and the choke point."""
        self._call = call
        self._facts = facts
        self._outgoing = outgoing
        self._done: OrderedDict[str, None] = OrderedDict()
        self._reached = True
        self.loop = Loop("the answering of plans", lambda: self.look(), most_pause_s=2 * RETRY_S)

    def start(self) -> None:
        """Look now, and then every few seconds; does nothing when the policy answers no plans."""
        if self._facts.policy.answer_plans:
            self.loop.start()

    def stop(self) -> None:
        """End the thread; a request in progress is not waited for longer than a second."""
        self.loop.stop()

    def look(self) -> float:
        """Fetch and answer what there is; the seconds until the next look."""
        try:
            questions = self._call("GET", "/v1/questions").get("questions")
            for document in questions[:MAX_AT_ONCE] if isinstance(questions, list) else ():
                name = _name(document)
                if name and name not in self._done and not self.loop.stopping.is_set():
                    self._remember(name)  # first: a defect met by one question must not keep back the next ones
                    try:
                        self._answer(document)
                    except ConcordatError:
                        self._done.pop(name, None)  # it is asked for again
                        raise
        except ConcordatError as error:
            if self._reached:  # once, not every few seconds
                log.warning("cannot look for the coordinator's questions: %s", error.message)
            self._reached = False
            return RETRY_S
        self._reached = True
        return EVERY_S

    def answer(self, document: Any) -> Sealed:
        """The signed answer to one question.

        Raises:
            SignatureError: it is not signed by a key that may sign orders.
            ConfigError: it is no question, or not one for this site and this time.
        """
        facts = self._facts
        key = str(document.get("key", "")) if isinstance(document, dict) else ""
        if not facts.accepts_key(key):
            raise SignatureError(f"signed by key {key[:16]!r}, which is not the coordinator's")
        question = PlanQuestion.from_dict(open_document(document, key))
        now = time.time()
        if question.site != facts.site or facts.site not in question.spec.run.sites:
            raise ConfigError(f"the question is for site {question.site}, of {len(question.spec.run.sites)} sites")
        if now > question.expires_at or question.issued_at > now + CLOCK_SKEW_S:
            raise ConfigError("the question is of another time; check both clocks")
        objections = [Objection("policy", refusal.message) for refusal in refusals(question.spec, facts.policy)]
        if unfit := facts.base.objection(question.spec):
            objections.append(unfit)
        if self._outgoing.suspended(question.spec.run.name):
            objections.append(Objection("suspended", SUSPENDED))
        return self._outgoing.plan(question, facts.dataset.name, objections, facts.policy.min_noise_multiplier)

    def _answer(self, document: Any) -> None:
        """Answer and bring the answer; a question that cannot be answered is logged and left alone."""
        try:
            sealed = self.answer(document)
        except ConcordatError as error:
            log.warning("a question of the coordinator gets no answer: %s", error.message)
            return
        except Exception:  # one question, whatever it holds, must not end the answers to all others
            log.exception("a question of the coordinator could not be answered")
            return
        body = json.loads(sealed.document)["body"]
        log.info(
            "answered a plan: %d of %d rounds are affordable, %d objections",
            min(body["rounds_affordable"], body["rounds_asked"]), body["rounds_asked"], len(body["objections"]),
        )  # fmt: skip
        self._call("POST", "/v1/answers", {"answer": json.loads(sealed.document)})

    def _remember(self, name: str) -> None:
        self._done[name] = None
        if len(self._done) > REMEMBERED:
            self._done.popitem(last=False)


def _name(document: Any) -> str:
    """What a question is remembered by; "" for what nobody can have signed."""
    try:
        return sha256_hex(canonical_bytes({"document": document}))
    except ConcordatError:
        return ""
