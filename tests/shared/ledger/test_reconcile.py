"""The site's ledger against the coordinator's receipts: every divergence is named."""

from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from fl_shared.ledger.receipts import StoredReceipt, load
from fl_shared.ledger.reconcile import reconcile
from helpers.ledgers import ROUND, SITE, opened, receipt, with_releases


def kinds(ledger: Ledger, kept: list[StoredReceipt]) -> list[tuple[str, int | None]]:
    return [(each.kind, each.round) for each in reconcile(ledger, kept)]


def test_two_copies_that_agree(ledger: Ledger, key: SigningKey) -> None:
    """Receipts of all releases, in any order and one of them sent twice, agree; local runs need none."""
    kept = with_releases(ledger, key)
    held = ledger.reserve("icd", ROUND, run="alone:demo", round=1)
    ledger.settle(held, ROUND, "sha256:local")
    ledger.charge_in_doubt(ledger.reserve("icd", ROUND, run="demo", round=9), "the process died")
    assert reconcile(ledger, [kept[2], kept[0], kept[1], kept[1]]) == []


def test_a_repeated_answer_carries_a_later_head(ledger: Ledger, key: SigningKey) -> None:
    """A receipt made again later pins a longer ledger and more epsilon; both fit."""
    kept = with_releases(ledger, key)
    first = list(ledger.spends())[0].settled_seq  # noqa: RUF015  # read to the end
    assert first is not None
    assert reconcile(ledger, [*kept, receipt(ledger, key, first)]) == []


def test_a_receipt_that_the_coordinator_lost(ledger: Ledger, key: SigningKey) -> None:
    """A release without receipt is missing."""
    kept = with_releases(ledger, key)
    assert kinds(ledger, [kept[0], kept[2]]) == [("missing", 2)]


def test_a_release_that_the_site_denies(ledger: Ledger, key: SigningKey, tmp_path: Path) -> None:
    """Receipts of rounds that another ledger under the same key never settled are extra."""
    kept = with_releases(ledger, key)
    with opened(f"sqlite:///{tmp_path / 'other.sqlite'}", key) as other:
        assert kinds(other, kept) == [("extra", 1), ("extra", 2), ("extra", 3)]


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"round": 7}, "round"),
        ({"run": "other"}, "run"),
        ({"update_digest": f"sha256:{'0' * 64}"}, "update_digest"),
        ({"mechanism": ROUND.to_dict() | {"noise_multiplier": 2.0}}, "mechanism"),
        ({"steps_executed": 7}, "steps_executed"),
        ({"epsilon_spent_total": 0.1}, "epsilon_spent_total"),
        ({"ledger_head": "0" * 64}, "ledger_head"),
        ({"ledger_entries": 99}, "ledger_head"),
        ({"merkle_root": "0" * 64}, "merkle_root"),
    ],
)
def test_each_field_that_contradicts(ledger: Ledger, key: SigningKey, change: dict[str, object], word: str) -> None:
    """A signed receipt whose field says something else than the ledger is different, and the field is named."""
    kept = with_releases(ledger, key)
    seq = int(str(kept[2].claims["entry_id"]).partition(":")[0])
    found = reconcile(ledger, [*kept[:2], receipt(ledger, key, seq, **change)])
    assert [each.kind for each in found] == ["different"]
    assert f"its {word} is" in found[0].message


def test_what_the_site_never_signed(ledger: Ledger, key: SigningKey) -> None:
    """A receipt under a stranger's key, an altered one and a document that is none are unsigned."""
    kept = with_releases(ledger, key)
    altered = json.loads(json.dumps(kept[0].document))
    altered["body"]["steps_executed"] = 1
    seq = int(str(kept[0].claims["entry_id"]).partition(":")[0])
    stranger = receipt(ledger, SigningKey.generate(), seq)
    found = kinds(ledger, [*kept, StoredReceipt(altered), stranger, StoredReceipt("nothing")])
    assert found == [("unsigned", 1), ("unsigned", 1), ("unsigned", None)]


def test_receipts_of_a_key_that_was_replaced(url: str, key: SigningKey) -> None:
    """After a rotation the receipts under the old key still count, as do new ones."""
    fresh = SigningKey.generate()
    with opened(url, key) as ledger:
        kept = with_releases(ledger, key)
        ledger.rotate_key(fresh, "DPO", "yearly")
        entry = ledger.settle(ledger.reserve("icd", ROUND, run="demo", round=4), ROUND, f"sha256:{'4' * 64}")
        assert reconcile(ledger, [*kept, receipt(ledger, fresh, entry.seq)]) == []


def test_where_receipts_come_from(ledger: Ledger, key: SigningKey, tmp_path: Path) -> None:
    """The exported file in each of its forms and the coordinator's own database give the same receipts."""
    kept = with_releases(ledger, key)
    rows = [one.to_dict() for one in kept]
    texts = [{"document_json": json.dumps(one.document), "received_at": one.received_at} for one in kept]
    path = tmp_path / "receipts.json"
    for document in ({"format": "concordat-receipts/1", "receipts": rows}, {"receipts": texts}, rows):
        path.write_text(json.dumps(document))
        assert load(str(path), SITE) == kept
        assert load(str(path), "hospital-002") == []
    database = tmp_path / "coordinator.sqlite"
    with sqlite3.connect(database) as connection:
        connection.execute("CREATE TABLE replies (status TEXT, site TEXT, document_json TEXT, received_at REAL)")
        for row in texts:
            values = ("ok", SITE, row["document_json"], row["received_at"])
            connection.execute("INSERT INTO replies VALUES (?, ?, ?, ?)", values)
        connection.execute("INSERT INTO replies VALUES ('refused', ?, 'x', 1.0)", (SITE,))
    connection.close()
    assert load(f"sqlite:///{database}", SITE) == kept


def test_a_file_that_holds_no_receipts(tmp_path: Path, url: str, key: SigningKey) -> None:
    """A missing file, no JSON, another document and a site's ledger in place of the coordinator's: in words."""
    path = tmp_path / "receipts.json"
    with pytest.raises(ConfigError, match="no receipts at"):
        load(str(path), SITE)
    for text, word in (("{", "is not JSON"), ('{"a": 1}', "holds no receipts"), ("[1]", "is no table")):
        path.write_text(text)
        with pytest.raises(LedgerError, match=word):
            load(str(path), SITE)
    opened(url, key).close()
    with pytest.raises(LedgerError, match="no coordinator's database"):
        load(url, SITE)
