"""A bundle is checked offline with the public key alone; whatever is changed in it is found."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fl_shared.errors import ConfigError, LedgerError
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import bundle
from fl_shared.ledger.models import metadata
from fl_shared.ledger.verify import Report, verify_ledger
from helpers.ledgers import SITE, opened, story, with_releases

Line = dict[str, Any]


def written(url: str, key: SigningKey, path: Path) -> dict[str, Any]:
    with opened(url, key) as ledger:
        story(ledger)
        ledger.rotate_key(SigningKey.generate(), "DPO", "rotation")
        return bundle.write(ledger, path)


def checked(path: Path, key: SigningKey, directory: Path) -> Report:
    directory.mkdir()
    return verify_ledger(bundle.unpack(path, directory), SITE, public_key=key.public_hex, processes=1)


def complaints(path: Path, key: SigningKey, directory: Path) -> list[str]:
    """What verification says, or why no ledger can be made of it."""
    try:
        return [problem.message for problem in checked(path, key, directory).problems]
    except LedgerError as error:
        return [error.message]


def rewritten(path: Path, change: Callable[[list[Line]], None]) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    lines = [json.loads(line) for line in members["entries.jsonl"].splitlines()]
    change(lines)
    members["entries.jsonl"] = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)


def test_a_bundle_is_the_ledger_again(url: str, key: SigningKey, tmp_path: Path) -> None:
    """Out of either database and back: it verifies, and every row of every table is the same."""
    path = tmp_path / "bundle.zip"
    said = written(url, key, path)
    report = checked(path, key, tmp_path / "out")
    assert report.problems == []
    assert (report.entries, report.head, report.merkle_root) == (said["entries"], said["head"], said["merkle_root"])
    with opened(url, None) as source, opened(f"sqlite:///{tmp_path / 'out' / 'ledger.sqlite'}", None) as copy:
        for table in metadata.sorted_tables:
            rows = []
            for one in (source, copy):
                with one.reading() as connection:
                    rows.append(sorted((tuple(row) for row in connection.execute(table.select())), key=repr))
            assert rows[0] == rows[1], table.name


def test_a_bundle_holds_no_secret(url: str, key: SigningKey, tmp_path: Path) -> None:
    """Nothing but signed entries, receipts and public keys is in it, and no database address."""
    path = tmp_path / "bundle.zip"
    written(url, key, path)
    with zipfile.ZipFile(path) as archive:
        assert set(archive.namelist()) == {"entries.jsonl", "receipts.json", "bundle.json", "README.txt"}
        everything = b"".join(archive.read(name) for name in archive.namelist())
    assert b"PRIVATE" not in everything
    assert b"sqlite:" not in everything
    assert b"postgresql:" not in everything


@pytest.mark.parametrize("column", ["seq", "kind", "body", "prev_hash", "hash", "signature", "created_at"])
def test_a_changed_column_is_found(tmp_path: Path, key: SigningKey, column: str) -> None:
    """Each column of an entry in turn is changed in the file: verification names the entry, or no ledger is made."""
    path = tmp_path / "bundle.zip"
    written(f"sqlite:///{tmp_path / 'ledger.sqlite'}", key, path)

    def change(lines: list[Line]) -> None:
        value = lines[9][column]
        lines[9][column] = value + 1000 if isinstance(value, int) else value[:-1] + ("0" if value[-1] != "0" else "1")

    rewritten(path, change)
    assert any("10" in said for said in complaints(path, key, tmp_path / "out"))


@pytest.mark.parametrize("act", ["drop", "swap", "duplicate", "cut"])
def test_lines_taken_out_or_put_elsewhere(tmp_path: Path, key: SigningKey, act: str) -> None:
    """A line dropped, swapped or doubled, and a cut end, are found; the cut by what the bundle itself claims."""
    path = tmp_path / "bundle.zip"
    said = written(f"sqlite:///{tmp_path / 'ledger.sqlite'}", key, path)

    def change(lines: list[Line]) -> None:
        if act == "drop":
            del lines[1]
        elif act == "swap":
            lines[8]["seq"], lines[9]["seq"] = lines[9]["seq"], lines[8]["seq"]
        elif act == "duplicate":
            lines.append(lines[5])
        else:
            del lines[-1]

    rewritten(path, change)
    if act == "cut":
        assert checked(path, key, tmp_path / "out").entries < said["entries"]
    else:
        assert complaints(path, key, tmp_path / "out")


def test_a_bundle_carries_the_receipts(url: str, key: SigningKey, tmp_path: Path) -> None:
    """The coordinator's receipts come back as they were packed."""
    with opened(url, key) as ledger:
        kept = with_releases(ledger, key)
        bundle.write(ledger, tmp_path / "bundle.zip", kept)
    assert bundle.receipts_in(tmp_path / "bundle.zip") == kept


def test_what_is_no_bundle(tmp_path: Path, key: SigningKey) -> None:
    """An existing file is not overwritten; a ZIP of something else, a torn and a spoilt bundle are refused in words."""
    path = tmp_path / "bundle.zip"
    url = f"sqlite:///{tmp_path / 'ledger.sqlite'}"
    written(url, key, path)
    with opened(url, None) as ledger, pytest.raises(ConfigError, match="exists"):
        bundle.write(ledger, path)
    other = tmp_path / "other.zip"
    with zipfile.ZipFile(other, "w") as archive:
        archive.writestr("a", b"b")
    with pytest.raises(LedgerError, match=r"bundle\.json cannot be read"):
        bundle.about(other)
    with pytest.raises(LedgerError, match="holds no ledger"):
        bundle.unpack(other, tmp_path)
    torn = tmp_path / "torn.zip"
    torn.write_bytes(path.read_bytes()[:500])
    with pytest.raises(LedgerError, match="cannot be read"):
        bundle.about(torn)
    rewritten(path, lambda lines: lines[3].update(extra=1))
    (tmp_path / "fresh").mkdir()
    with pytest.raises(LedgerError, match="line 4"):
        bundle.unpack(path, tmp_path / "fresh")
