"""What the coordinator asks a site before a run is launched, and what the site answers.

Both are plain documents, signed by the one who says them (`fl_shared.identity.signing.sign_document`). An answer
depends on the site's policy, its base model's digest and its ledger alone, costs nothing and promises nothing: the
round's own reservation decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from fl_shared.documents.manifest import RunSpec, check_digest, document_digest
from fl_shared.errors import ConfigError, printable, shown
from fl_shared.fields import Fields
from fl_shared.names import site_id

# How one site stands to a plan: it answered, or why it did not.
AFFORDABLE, REFUSED = "affordable", "refused"
SILENT, NOT_ONLINE, NOT_ENROLLED = "silent", "not-online", "not-enrolled"
WAIT_S = 20.0
OBJECTION_CODES = ("budget-exhausted", "policy", "unknown-base-model", "unsupported-spec", "suspended")
MAX_OBJECTIONS = 16
MAX_OBJECTION = 500
MAX_ROUNDS = 1_000_000
_NAME = re.compile(r"[0-9a-f]{32}")


def _question(value: object) -> str:
    if not isinstance(value, str) or _NAME.fullmatch(value) is None:
        raise ConfigError(f"{shown(value)} names no question", fix="write 32 lower-case hex digits")
    return value


@dataclass(frozen=True, slots=True)
class PlanQuestion:
    """Would you take part in this run, and for how many rounds? Signed by the coordinator, for one site."""

    question: str
    site: str
    spec: RunSpec
    issued_at: float
    expires_at: float

    @property
    def digest(self) -> str:
        """The digest of the question's body."""
        return document_digest(self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": "plan-question",
            "question": self.question,
            "site": self.site,
            "spec": self.spec.to_dict(),
            "issued_at": float(self.issued_at),
            "expires_at": float(self.expires_at),
        }

    @classmethod
    def from_dict(cls, table: Any) -> PlanQuestion:
        """Read and check a question's body; ConfigError on anything else."""
        f = Fields(table, "question")
        f.choice("kind", ["plan-question"])
        made = cls(
            question=f.named("question", _question),
            site=f.named("site", site_id),
            spec=RunSpec.from_dict(f.table("spec"), where="question spec"),
            issued_at=f.number("issued_at", low=0),
            expires_at=f.number("expires_at", low=0),
        )
        f.done()
        return made


@dataclass(frozen=True, slots=True)
class Objection:
    """One reason why a site would refuse a round of the run."""

    code: str
    message: str

    def __str__(self) -> str:
        return f"{self.code}: {printable(' '.join(self.message.split()))}"[:MAX_OBJECTION]

    @classmethod
    def parse(cls, text: object) -> Objection:
        """Read `code: message`; ConfigError when the code is none of the known ones."""
        code, colon, message = text.partition(": ") if isinstance(text, str) else ("", "", "")
        if code not in OBJECTION_CODES or not colon or len(str(text)) > MAX_OBJECTION:
            raise ConfigError(f"{shown(text)} is no objection", fix=f"begin with one of {', '.join(OBJECTION_CODES)}")
        return cls(code, message)


@dataclass(frozen=True, slots=True)
class PlanAnswer:
    """A site's answer: no objection, or why it would refuse. Signed by the site.

    Attributes:
        rounds_affordable: further rounds of this spec that the budget holds, whatever the policy says.
        noise_that_fits: the least noise multiplier at which all rounds would fit; 0 when they do already, or
            when no noise is enough.
    """

    question: str
    question_digest: str
    site: str
    rounds_asked: int
    rounds_affordable: int
    noise_that_fits: float
    objections: tuple[Objection, ...]
    created_at: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {
            "kind": "plan-answer",
            "question": self.question,
            "question_digest": self.question_digest,
            "site": self.site,
            "rounds_asked": self.rounds_asked,
            "rounds_affordable": self.rounds_affordable,
            "noise_that_fits": float(self.noise_that_fits),
            "objections": [str(each) for each in self.objections],
            "created_at": float(self.created_at),
        }

    @classmethod
    def from_dict(cls, table: Any) -> PlanAnswer:
        """Read and check an answer's body; ConfigError on anything else."""
        f = Fields(table, "answer")
        f.choice("kind", ["plan-answer"])
        made = cls(
            question=f.named("question", _question),
            question_digest=f.named("question_digest", check_digest),
            site=f.named("site", site_id),
            rounds_asked=f.integer("rounds_asked", low=1, high=100_000),
            rounds_affordable=f.integer("rounds_affordable", low=0, high=MAX_ROUNDS),
            noise_that_fits=f.number("noise_that_fits", low=0, high=1e6),
            objections=tuple(Objection.parse(each) for each in f.texts("objections", low=0, high=MAX_OBJECTIONS)),
            created_at=f.number("created_at", low=0),
        )
        f.done()
        return made
