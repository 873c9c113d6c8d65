"""The ledger's tables.

`entries` is the chain: each row holds canonical JSON, the hash of the row before, its own hash and a
signature. The typed tables repeat an entry's body as columns (their key is the entry's `seq`), so that the
database itself can hold the invariants; `verify` compares each typed row with its entry. Nothing is ever
updated or deleted: a change of state is a new row. The tables as they are made, with their triggers, are in
`migrations/`; a test holds the two against each other.
"""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    UniqueConstraint,
)

ENTRY_KINDS = ("genesis", "dataset", "overlap", "budget", "reservation", "settlement", "witness", "key")
OUTCOMES = SETTLED, VOIDED, IN_DOUBT = ("settled", "released", "in-doubt")
"""How a reservation ends. Voided: nothing private was read and nothing left, so nothing is charged; `released` is what
such a row has always said."""
OVERALL = ""  # the study of a budget that holds for every study

metadata = MetaData()


def _in(column: str, values: tuple[str, ...]) -> str:
    return f"{column} IN ({', '.join(repr(value) for value in values)})"


def _seq() -> Column[int]:
    return Column("seq", BigInteger, ForeignKey("entries.seq", name="entry"), primary_key=True, autoincrement=False)


entries = Table(
    "entries",
    metadata,
    Column("seq", BigInteger, primary_key=True, autoincrement=False),
    Column("kind", String(16), nullable=False),
    Column("body", Text, nullable=False),
    Column("prev_hash", String(64), nullable=False),
    Column("hash", String(64), nullable=False),
    Column("signature", String(128), nullable=False),
    Column("created_at", String(27), nullable=False),
    UniqueConstraint("hash", name="entries_hash"),
    CheckConstraint("seq >= 1", name="entries_seq"),
    CheckConstraint(_in("kind", ENTRY_KINDS), name="entries_kind"),
    CheckConstraint("length(hash) = 64 AND length(prev_hash) = 64", name="entries_hash_length"),
    CheckConstraint("length(signature) = 128", name="entries_signature_length"),
)

datasets = Table(
    "datasets",
    metadata,
    _seq(),
    Column("name", String(200), nullable=False),
    Column("version", Integer, nullable=False),
    Column("fingerprint", String(200), nullable=False),
    Column("privacy_unit", String(64), nullable=False),
    Column("units", BigInteger, nullable=False),
    Column("bound_per_unit", Integer, nullable=False),
    UniqueConstraint("name", "version", name="datasets_version"),
    CheckConstraint("units >= 1 AND bound_per_unit >= 1 AND version >= 1", name="datasets_positive"),
)

overlaps = Table(
    "dataset_overlaps",
    metadata,
    _seq(),
    Column("first", String(200), nullable=False),
    Column("second", String(200), nullable=False),
    Column("reason", Text, nullable=False),
    UniqueConstraint("first", "second", name="dataset_overlaps_pair"),
    CheckConstraint("first < second", name="dataset_overlaps_order"),
)

budgets = Table(
    "budgets",
    metadata,
    _seq(),
    Column("dataset", String(200), nullable=False),
    Column("study", String(200), nullable=False),
    Column("version", Integer, nullable=False),
    Column("epsilon", Float, nullable=False),
    Column("delta", Float, nullable=False),
    Column("filter_order", Float, nullable=False),
    Column("valid_from", String(27)),
    Column("valid_to", String(27)),
    Column("approver", String(200), nullable=False),
    UniqueConstraint("dataset", "study", "version", name="budgets_version"),
    CheckConstraint("epsilon > 0 AND epsilon < 1e6", name="budgets_epsilon"),
    CheckConstraint("delta > 0 AND delta < 1", name="budgets_delta"),
    CheckConstraint("filter_order > 1 AND filter_order < 1e6", name="budgets_order"),
    CheckConstraint("valid_from IS NULL OR valid_to IS NULL OR valid_from < valid_to", name="budgets_period"),
    CheckConstraint("length(approver) >= 1 AND version >= 1", name="budgets_approver"),
)

reservations = Table(
    "reservations",
    metadata,
    _seq(),
    Column("dataset", String(200), nullable=False),
    Column("dataset_seq", BigInteger, ForeignKey("datasets.seq", name="reservation_dataset"), nullable=False),
    Column("study", String(200), nullable=False),
    Column("run", String(200), nullable=False),
    Column("round", Integer, nullable=False),
    Column("purpose", String(64), nullable=False),
    Column("attempt", Integer, nullable=False),
    Column("kind", String(64), nullable=False),
    Column("neighbouring", String(64), nullable=False),
    Column("noise_multiplier", Float, nullable=False),
    Column("sampling_probability", Float, nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("clipping_norm", Float, nullable=False),
    UniqueConstraint("run", "round", "dataset", "purpose", "attempt", name="reservations_once"),
    CheckConstraint("noise_multiplier > 0 AND noise_multiplier < 1e9", name="reservations_noise"),
    CheckConstraint("sampling_probability > 0 AND sampling_probability <= 1", name="reservations_sampling"),
    CheckConstraint("steps >= 1 AND attempt >= 1 AND round >= 0", name="reservations_counts"),
    CheckConstraint("clipping_norm > 0 AND clipping_norm <= 1e12", name="reservations_clipping"),
)

settlements = Table(
    "settlements",
    metadata,
    _seq(),
    Column("reservation", BigInteger, ForeignKey("reservations.seq", name="settled"), nullable=False),
    Column("outcome", String(16), nullable=False),
    Column("steps", BigInteger, nullable=False),
    Column("release_digest", String(200)),
    Column("reason", Text, nullable=False),
    UniqueConstraint("reservation", name="settlements_once"),
    CheckConstraint(_in("outcome", OUTCOMES), name="settlements_outcome"),
    CheckConstraint("steps >= 0", name="settlements_steps"),
    CheckConstraint("(outcome = 'released') = (steps = 0)", name="settlements_released"),
    CheckConstraint("(outcome = 'settled') = (release_digest IS NOT NULL)", name="settlements_digest"),
    CheckConstraint("outcome = 'settled' OR length(reason) >= 1", name="settlements_reason"),
)

# A cache of sums, so that the gate needs no walk over the whole ledger. Rows are only added: the newest
# version of a key holds its totals. `verify` recomputes them and trusts none.
tally_keys = Table(
    "tally_keys",
    metadata,
    Column("id", Integer, primary_key=True),
    Column("dataset", String(200), nullable=False),
    Column("study", String(200), nullable=False),
    Column("kind", String(64), nullable=False),
    Column("neighbouring", String(64), nullable=False),
    Column("noise_multiplier", Float, nullable=False),
    Column("sampling_probability", Float, nullable=False),
    UniqueConstraint(
        "dataset",
        "study",
        "kind",
        "neighbouring",
        "noise_multiplier",
        "sampling_probability",
        name="tally_keys_once",
    ),
)

tallies = Table(
    "tallies",
    metadata,
    _seq(),
    Column("key", Integer, ForeignKey("tally_keys.id", name="tally_key"), nullable=False),
    Column("version", BigInteger, nullable=False),
    Column("held", BigInteger, nullable=False),
    Column("spent", BigInteger, nullable=False),
    UniqueConstraint("key", "version", name="tallies_version"),
    CheckConstraint("held >= 0 AND spent >= 0", name="tallies_positive"),
)

# Inner nodes of the Merkle tree over entry hashes, written when both children are complete; leaves are stored in
# `entries`. Also a cache: `verify` hashes the whole tree again.
merkle_nodes = Table(
    "merkle_nodes",
    metadata,
    Column("level", Integer, primary_key=True, autoincrement=False),
    Column("position", BigInteger, primary_key=True, autoincrement=False),
    Column("hash", String(64), nullable=False),
    CheckConstraint("level >= 1 AND position >= 0", name="merkle_nodes_place"),
)

keys = Table(
    "keys",
    metadata,
    _seq(),
    Column("public_key", String(64), nullable=False),
    Column("replaces", String(64), nullable=False),
    Column("approver", String(200), nullable=False),
    Column("reason", Text, nullable=False),
    Column("proof", String(128), nullable=False),
)

Index("reservations_by_dataset", reservations.c.dataset, reservations.c.seq)
Index("reservations_by_run", reservations.c.run, reservations.c.round)

TYPED = {
    "dataset": datasets,
    "overlap": overlaps,
    "budget": budgets,
    "reservation": reservations,
    "settlement": settlements,
    "key": keys,
}
APPEND_ONLY = tuple(table.name for table in metadata.sorted_tables)
