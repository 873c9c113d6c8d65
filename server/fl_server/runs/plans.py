"""Ask sites whether they would take part in a run, before it is launched.

A plan puts one signed question for each site into SQL. Sites fetch theirs from the gateway whenever they look
(`GET /v1/questions`, every few seconds), and bring their signed answers (`POST /v1/answers`); whether and what a site
answers is its own decision. Nothing is sent to a site, and a site that does not look is simply silent.
"""

from __future__ import annotations

import json
import secrets
import time
from dataclasses import dataclass
from typing import Any

from sqlalchemy import delete, select

from fl_server.db.models import QuestionRow, SiteRow
from fl_server.db.store import Store
from fl_server.identity.presence import is_heard
from fl_server.runs.bases import announced
from fl_shared.documents.plan import (
    AFFORDABLE,
    NOT_ENROLLED,
    NOT_ONLINE,
    REFUSED,
    SILENT,
    WAIT_S,
    Objection,
    PlanAnswer,
    PlanQuestion,
)
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError, SignatureError
from fl_shared.identity.signing import SigningKey, open_document, sign_document

MAX_WAIT_S = 600.0
MAX_PENDING = 32
KEPT_S = 86_400.0


@dataclass(frozen=True)
class SiteView:
    """What one site said, or why it said nothing. `answer_json` is the signed answer as it came.

    `objections` are of its answer, or follow from the base model that it has announced; then it was not asked.
    """

    site: str
    status: str
    objections: tuple[Objection, ...] = ()
    answer: PlanAnswer | None = None
    answer_json: str = ""
    last_seen_at: float = 0.0


@dataclass(frozen=True)
class Plan:
    """Questions that were put, and the sites that were not asked: not enrolled, or of another base model."""

    plan: str
    expires_at: float
    asked: tuple[str, ...]
    not_asked: tuple[SiteView, ...]


class Plans:
    """The questions of one coordinator."""

    def __init__(self, store: Store) -> None:
        self._store = store

    def ask(self, spec: RunSpec, key: SigningKey, wait_s: float) -> Plan:
        """Put a question to each enrolled site of the spec; it can be answered for `wait_s` seconds (0: 20).

        A site that has announced a base model which the spec does not fit is not asked: its refusal is known.

        Raises:
            ConfigError: another waiting time than 1 s to 10 minutes.
        """
        wait_s = wait_s or WAIT_S
        if not 1.0 <= wait_s <= MAX_WAIT_S:
            raise ConfigError(f"a wait of {wait_s:g} s is refused", fix=f"choose 1 to {MAX_WAIT_S:.0f} s")
        now, plan = time.time(), secrets.token_hex(16)
        asked, missing = [], []
        with self._store.write() as session:
            session.execute(delete(QuestionRow).where(QuestionRow.expires_at < now - KEPT_S))
            for site in spec.run.sites:
                row = session.get(SiteRow, site)
                if row is None or row.state != "enrolled":
                    missing.append(SiteView(site, NOT_ENROLLED, last_seen_at=row.last_seen_at if row else 0.0))
                    continue
                base = announced(row)
                if base is not None and (objection := base.objection(spec)):
                    missing.append(SiteView(site, REFUSED, (objection,), last_seen_at=row.last_seen_at))
                    continue
                question = PlanQuestion(secrets.token_hex(16), site, spec, issued_at=now, expires_at=now + wait_s)
                session.add(
                    QuestionRow(
                        question=question.question,
                        plan=plan,
                        site=site,
                        document_json=json.dumps(sign_document(key, question.to_dict()), sort_keys=True),
                        issued_at=now,
                        expires_at=question.expires_at,
                    )
                )
                asked.append(site)
        return Plan(plan, now + wait_s, tuple(asked), tuple(missing))

    def pending(self, site: str) -> list[Any]:
        """The signed questions that a site can still answer, the oldest first."""
        query = (
            select(QuestionRow.document_json)
            .where(QuestionRow.site == site, QuestionRow.expires_at > time.time(), QuestionRow.answer_json == "")
            .order_by(QuestionRow.issued_at)
            .limit(MAX_PENDING)
        )
        with self._store.read() as session:
            return [json.loads(text) for text in session.scalars(query)]

    def take(self, site: str, document: Any) -> None:
        """Keep a site's answer, the first that comes.

        Raises:
            SignatureError: it is not signed by this site's key.
            ConfigError: it is no answer, or answers no question that this site was asked and can still answer.
        """
        body = document.get("body") if isinstance(document, dict) else None
        name = body.get("question") if isinstance(body, dict) else None
        with self._store.write() as session:
            row = session.get(QuestionRow, name) if isinstance(name, str) else None
            asker = session.get(SiteRow, site)
            if row is None or asker is None or row.site != site or row.expires_at < time.time():
                raise ConfigError("this site has no such question any more", fix="ask for the questions again")
            answer = PlanAnswer.from_dict(open_document(document, asker.signing_key))
            question = PlanQuestion.from_dict(json.loads(row.document_json)["body"])
            if (answer.site, answer.question_digest) != (site, question.digest):
                raise SignatureError("the answer is to another question", fix="answer the question as it was put")
            if answer.rounds_asked != question.spec.run.rounds:
                raise ConfigError("the answer is about other rounds", fix="answer the question as it was put")
            if not row.answer_json:
                row.answer_json, row.answered_at = json.dumps(document, sort_keys=True), time.time()

    def answers(self, plan: Plan) -> dict[str, SiteView]:
        """What has been answered so far, by site."""
        query = select(QuestionRow).where(QuestionRow.plan == plan.plan, QuestionRow.answer_json != "")
        with self._store.read() as session:
            rows = list(session.scalars(query))
        views = {}
        for row in rows:
            answer = PlanAnswer.from_dict(json.loads(row.answer_json)["body"])
            status = REFUSED if answer.objections else AFFORDABLE
            views[row.site] = SiteView(row.site, status, answer.objections, answer, row.answer_json, row.answered_at)
        return views

    def silent(self, site: str) -> SiteView:
        """A site that has not answered: it is heard of and looks for no questions, or it is not there at all."""
        with self._store.read() as session:
            row = session.get(SiteRow, site)
        if row is None:
            return SiteView(site, NOT_ONLINE)
        return SiteView(site, SILENT if is_heard(row) else NOT_ONLINE, last_seen_at=row.last_seen_at)
