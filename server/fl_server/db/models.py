"""The tables. Times are Unix seconds; digests are `sha256:<hex>`; documents are the signed JSON as it came.

A run's truth is here and nowhere in Flower: a round exists when its row says `committed`, and its artifacts were on
disk before that row.
"""

from __future__ import annotations

from sqlalchemy import BigInteger, CheckConstraint, Float, ForeignKey, Index, Integer, LargeBinary, String, Text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

SITE_STATES = ("invited", "enrolled", "revoked")
KEY_KINDS = ("signing", "node", "tls")
RUN_STATES = ("pending", "running", "paused", "stopped", "failed", "completed")
GOING = ("pending", "running")
ENDED = ("stopped", "failed", "completed")
REPLY_STATES = ("ok", "refused", "failed", "late", "missing", "invalid")


def _one_of(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


class Base(DeclarativeBase):
    """The metadata of every table."""


class SiteRow(Base):
    """One institution: what it proved at enrolment, and whether it may still speak.

    `next_fingerprint` is a renewed certificate that was not used yet; until it is, both are valid. `last_seen_at` is
    when the site last spoke to the gateway, `node_seen_at` when the SuperLink last accepted a call of its node.
    `base_model` (its digest), `base_targets` (names with commas between) and `orders` (the newest kind that its agent
    reads, `fl_shared.documents.order`) are what the site has announced last.
    """

    __tablename__ = "sites"
    __table_args__ = (CheckConstraint(_one_of("state", SITE_STATES), name="site_state"),)

    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    signing_key: Mapped[str] = mapped_column(String(64), default="")
    node_public_key: Mapped[str] = mapped_column(Text, default="")
    node_key_fingerprint: Mapped[str] = mapped_column(String(80), default="")
    node_id: Mapped[str] = mapped_column(String(32), default="")
    certificate_fingerprint: Mapped[str] = mapped_column(String(64), default="", index=True)
    certificate_expires_at: Mapped[float] = mapped_column(Float, default=0.0)
    next_fingerprint: Mapped[str] = mapped_column(String(64), default="")
    next_expires_at: Mapped[float] = mapped_column(Float, default=0.0)
    invited_at: Mapped[float] = mapped_column(Float)
    enrolled_at: Mapped[float] = mapped_column(Float, default=0.0)
    revoked_at: Mapped[float] = mapped_column(Float, default=0.0)
    last_seen_at: Mapped[float] = mapped_column(Float, default=0.0)
    node_seen_at: Mapped[float] = mapped_column(Float, default=0.0)
    base_model: Mapped[str] = mapped_column(String(71), default="")
    base_targets: Mapped[str] = mapped_column(Text, default="")
    base_announced_at: Mapped[float] = mapped_column(Float, default=0.0)
    orders: Mapped[int] = mapped_column(Integer, default=0)


class SiteKeyRow(Base):
    """A public key that a site has proved. A retired one (revoked or replaced) is never accepted again, from anybody.

    `signing` keys are not retired: a site's ledger is signed by its key, and is not to be begun again.
    """

    __tablename__ = "site_keys"
    __table_args__ = (CheckConstraint(_one_of("kind", KEY_KINDS), name="site_key_kind"),)

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    kind: Mapped[str] = mapped_column(String(8))
    site: Mapped[str] = mapped_column(ForeignKey("sites.site"), index=True)
    proved_at: Mapped[float] = mapped_column(Float)
    retired_at: Mapped[float] = mapped_column(Float, default=0.0)


class OperatorRow(Base):
    """A certificate that this coordinator issued to an admin or an auditor; no other of these roles is accepted."""

    __tablename__ = "operators"
    __table_args__ = (CheckConstraint("role IN ('admin', 'auditor')", name="operator_role"),)

    fingerprint: Mapped[str] = mapped_column(String(64), primary_key=True)
    role: Mapped[str] = mapped_column(String(16))
    name: Mapped[str] = mapped_column(String(64))
    issued_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float)
    revoked_at: Mapped[float] = mapped_column(Float, default=0.0)


class InvitationRow(Base):
    """A one-time secret, kept as its SHA-256 only."""

    __tablename__ = "invitations"

    secret_hash: Mapped[bytes] = mapped_column(LargeBinary(32), primary_key=True)
    site: Mapped[str] = mapped_column(ForeignKey("sites.site"), index=True)
    created_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float)
    used_at: Mapped[float] = mapped_column(Float, default=0.0)


class RunRow(Base):
    """One federated training.

    `attempt` names the one ServerApp that may carry it now, `beat_at` is when that last gave a sign of life,
    `restarts` counts the attempts since the last committed round. `reason_code` is the typed form of `reason`, for
    whoever must not parse words; empty for what earlier versions wrote.
    """

    __tablename__ = "runs"
    __table_args__ = (CheckConstraint(_one_of("state", RUN_STATES), name="run_state"),)

    run: Mapped[str] = mapped_column(String(63), primary_key=True)
    state: Mapped[str] = mapped_column(String(16), index=True)
    reason: Mapped[str] = mapped_column(Text, default="")
    reason_code: Mapped[str] = mapped_column(String(64), default="")
    spec_json: Mapped[str] = mapped_column(Text)
    spec_digest: Mapped[str] = mapped_column(String(71))
    rounds: Mapped[int] = mapped_column(Integer)
    flower_run: Mapped[str] = mapped_column(String(32), default="")
    attempt: Mapped[str] = mapped_column(String(32), default="")
    beat_at: Mapped[float] = mapped_column(Float, default=0.0)
    restarts: Mapped[int] = mapped_column(Integer, default=0)
    created_at: Mapped[float] = mapped_column(Float)
    updated_at: Mapped[float] = mapped_column(Float)


class RoundRow(Base):
    """One aggregation. `bytes` counts what arrived from the sites.

    `state_digest` is the server optimizer's state, empty without one and for rounds of earlier versions.
    """

    __tablename__ = "rounds"
    __table_args__ = (CheckConstraint("state IN ('committed', 'failed')", name="round_state"),)

    run: Mapped[str] = mapped_column(ForeignKey("runs.run"), primary_key=True)
    round: Mapped[int] = mapped_column(Integer, primary_key=True)
    state: Mapped[str] = mapped_column(String(16))
    adapter_digest: Mapped[str] = mapped_column(String(71), default="")
    adapter_bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    state_digest: Mapped[str] = mapped_column(String(71), default="")
    bytes: Mapped[int] = mapped_column(BigInteger, default=0)
    seconds: Mapped[float] = mapped_column(Float, default=0.0)
    committed_at: Mapped[float] = mapped_column(Float)


class ReplyRow(Base):
    """What one site answered in one round; `document_json` is its signed receipt or refusal."""

    __tablename__ = "replies"
    __table_args__ = (CheckConstraint(_one_of("status", REPLY_STATES), name="reply_status"),)

    run: Mapped[str] = mapped_column(ForeignKey("runs.run"), primary_key=True)
    round: Mapped[int] = mapped_column(Integer, primary_key=True)
    site: Mapped[str] = mapped_column(String(63), primary_key=True)
    status: Mapped[str] = mapped_column(String(16))
    code: Mapped[str] = mapped_column(String(64), default="")
    message: Mapped[str] = mapped_column(Text, default="")
    epsilon_spent_total: Mapped[float] = mapped_column(Float, default=0.0)
    delta: Mapped[float] = mapped_column(Float, default=0.0)
    document_json: Mapped[str] = mapped_column(Text, default="")
    received_at: Mapped[float] = mapped_column(Float)


class ManifestRow(Base):
    """Every order that was ever signed: a receipt is valid for one of these alone.

    `document_json` is "" for a `RoundOrder`, which the other columns, the run's spec digest and the key make again.
    """

    __tablename__ = "manifests"

    digest: Mapped[str] = mapped_column(String(71), primary_key=True)
    run: Mapped[str] = mapped_column(ForeignKey("runs.run"))
    round: Mapped[int] = mapped_column(Integer)
    site: Mapped[str] = mapped_column(String(63))
    adapter_digest: Mapped[str] = mapped_column(String(71))
    document_json: Mapped[str] = mapped_column(Text)
    nonce: Mapped[str] = mapped_column(String(32), default="")
    issued_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float)

    __table_args__ = (Index("manifests_of_round", "run", "round", "site"),)


class EventRow(Base):
    """What happened, in order; `runs watch` reads this."""

    __tablename__ = "events"

    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    run: Mapped[str] = mapped_column(String(63), default="", index=True)
    at: Mapped[float] = mapped_column(Float)
    kind: Mapped[str] = mapped_column(String(32))
    round: Mapped[int] = mapped_column(Integer, default=0)
    site: Mapped[str] = mapped_column(String(63), default="")
    message: Mapped[str] = mapped_column(Text, default="")
    data_json: Mapped[str] = mapped_column(Text, default="{}")


class AdminLogRow(Base):
    """One link of the admin log, in the form of a site's ledger; triggers refuse every change (`fl_server.access.log`).

    `body` is canonical JSON, `created_at` ISO 8601 in UTC, as `fl_shared.ledger.chain` hashes and signs them.
    """

    __tablename__ = "admin_log"

    seq: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    kind: Mapped[str] = mapped_column(String(16))
    body: Mapped[str] = mapped_column(Text)
    prev_hash: Mapped[str] = mapped_column(String(64))
    hash: Mapped[str] = mapped_column(String(64), unique=True)
    signature: Mapped[str] = mapped_column(String(128))
    created_at: Mapped[str] = mapped_column(String(27))


class PromotionRow(Base):
    """A committed adapter was promoted to a name; the newest row of a name is in force."""

    __tablename__ = "promotions"

    number: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=True)
    name: Mapped[str] = mapped_column(String(63), index=True)
    run: Mapped[str] = mapped_column(ForeignKey("runs.run"))
    round: Mapped[int] = mapped_column(Integer)
    adapter_digest: Mapped[str] = mapped_column(String(71))
    promoted_by: Mapped[str] = mapped_column(String(80))
    promoted_at: Mapped[float] = mapped_column(Float)


class QuestionRow(Base):
    """What a plan asked one site, and what it answered; empty until then."""

    __tablename__ = "questions"

    question: Mapped[str] = mapped_column(String(32), primary_key=True)
    plan: Mapped[str] = mapped_column(String(32), index=True)
    site: Mapped[str] = mapped_column(String(63))
    document_json: Mapped[str] = mapped_column(Text)
    issued_at: Mapped[float] = mapped_column(Float)
    expires_at: Mapped[float] = mapped_column(Float)
    answer_json: Mapped[str] = mapped_column(Text, default="")
    answered_at: Mapped[float] = mapped_column(Float, default=0.0)

    __table_args__ = (Index("questions_of_site", "site", "expires_at"),)
