"""What the coordinator asks a site before a run is launched, and what the site answers.

Both are plain documents, signed by the one who says them (`fl_shared.identity.signing.sign_document`). An answer
depends on the site's policy, its base model's digest and its ledger alone, costs nothing and promises nothing: the
round's own reservation decides.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar

from fl_shared.declaration import Digested, Document
from fl_shared.documents.spec import MOST_ROUNDS, RunSpec
from fl_shared.errors import ConfigError, printable, shown
from fl_shared.fields import Between, Choice, Digest, Named, SiteName, Texts, Time, Whole

# One site's answer to a plan's question, or why there is none.
AFFORDABLE, REFUSED = "affordable", "refused"
SILENT, NOT_ONLINE, NOT_ENROLLED = "silent", "not-online", "not-enrolled"
WAIT_S = 20.0
OBJECTION_CODES = ("budget-exhausted", "policy", "unknown-base-model", "unsupported-spec", "suspended")
MAX_OBJECTIONS = 16
MAX_OBJECTION = 500
MAX_ROUNDS = 1_000_000
_NAME = r"[0-9a-f]{32}"


def _question(value: object) -> str:
    if not isinstance(value, str) or re.fullmatch(_NAME, value) is None:
        raise ConfigError(f"{shown(value)} names no question", fix="write 32 lower-case hex digits")
    return value


QuestionName = Annotated[str, Named(_question, f"^{_NAME}$")]


@dataclass(frozen=True)
class PlanQuestion(Digested):
    """Would you take part in this run, and for how many rounds? Signed by the coordinator, for one site."""

    WHERE: ClassVar = "question"

    kind: Annotated[str, Choice(["plan-question"])] = field(default="plan-question", kw_only=True)
    question: QuestionName
    site: SiteName
    spec: RunSpec
    issued_at: Time
    expires_at: Time


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


@dataclass(frozen=True)
class PlanAnswer(Document):
    """A site's answer: no objection, or why it would refuse. Signed by the site.

    Attributes:
        rounds_affordable: further rounds of this spec that the budget holds, whatever the policy says.
        noise_that_fits: the least noise multiplier at which all rounds would fit; 0 when they do already, or
            when no noise is enough.
    """

    WHERE: ClassVar = "answer"

    kind: Annotated[str, Choice(["plan-answer"])] = field(default="plan-answer", kw_only=True)
    question: QuestionName
    question_digest: Digest
    site: SiteName
    rounds_asked: Annotated[int, Whole(1, MOST_ROUNDS)]
    rounds_affordable: Annotated[int, Whole(0, MAX_ROUNDS)]
    noise_that_fits: Annotated[float, Between(0, 1e6)]
    objections: Annotated[tuple[Objection, ...], Texts(0, MAX_OBJECTIONS, check=Objection.parse)]
    created_at: Time

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return super().to_dict() | {"objections": [str(objection) for objection in self.objections]}
