"""Load a site's private table into `UnitData`: texts, labels, and which privacy unit each row belongs to."""

from __future__ import annotations

import hashlib
import hmac
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_client.config import DataConfig
from fl_client.data.tables import read_columns
from fl_client.data.units import UnitData
from fl_shared.errors import DataError

log = logging.getLogger("fl_client.data")


def load_unit_data(config: DataConfig, fingerprint_key: Path) -> UnitData:
    """Return the private data that `[data]` describes.

    Rows without text or label are left out; of one unit the first `max_records_per_unit` rows are used.
    Both rules look at one unit alone, so that they change nothing about neighbouring data sets. Raises
    DataError when the table cannot be used.
    """
    names = list(dict.fromkeys([*config.text_columns, config.label_column]))
    if config.unit_column is not None and config.unit_column not in names:
        names.append(config.unit_column)
    columns = read_columns(config.path, names)
    texts = _texts([columns[name] for name in config.text_columns], config.text_columns)
    labels = [label.strip() for label in columns[config.label_column]]
    owners = columns[config.unit_column] if config.unit_column is not None else None
    cells = zip(*(columns[name] for name in (*config.text_columns, config.label_column)), strict=True)
    usable = [row for row, text, label in zip(cells, texts, labels, strict=True) if text and label]
    unit_of_record, kept = _units(texts, labels, owners, config)
    if not kept:
        raise DataError(f"{config.path}: no row has both a text and a label", fix="check the columns in [data]")
    texts = [texts[i] for i in kept]
    labels = [labels[i] for i in kept]
    log.info("data set %s loaded, kept per %s", config.name, config.privacy_unit)
    return UnitData(
        texts=tuple(texts),
        labels=tuple(labels),
        unit_of_record=unit_of_record,
        units=int(unit_of_record.max()) + 1,
        fingerprint=fingerprint(usable, fingerprint_key),
    )


def _texts(columns: list[list[str]], names: tuple[str, ...]) -> list[str]:
    if len(columns) == 1:
        return [text.strip() for text in columns[0]]
    return [
        "; ".join(f"{name}: {value.strip()}" for name, value in zip(names, row, strict=True) if value.strip())
        for row in zip(*columns, strict=True)
    ]


def _units(
    texts: list[str], labels: list[str], owners: list[str] | None, config: DataConfig
) -> tuple[NDArray[np.int64], list[int]]:
    """Return the unit (0..units-1) of each kept row `[kept]`, and the kept rows' numbers."""
    numbers: dict[str, int] = {}
    used: dict[int, int] = {}
    units: list[int] = []
    kept: list[int] = []
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not text or not label:
            continue
        if owners is None:
            unit = len(units)
        else:
            owner = owners[row].strip()
            if not owner:
                raise DataError(
                    f"{config.path}: row {row + 1} has no {config.unit_column!r}",
                    fix=f"every row must say which {config.privacy_unit} it belongs to",
                )
            unit = numbers.setdefault(owner, len(numbers))
            used[unit] = used.get(unit, 0) + 1
            if used[unit] > config.max_records_per_unit:
                continue
        units.append(unit)
        kept.append(row)
    return np.asarray(units, dtype=np.int64), kept


def restrict_labels(data: UnitData, labels: tuple[str, ...]) -> UnitData:
    """Return the part of `data` whose labels are in a run's public label set, its units numbered anew.

    Records with other labels are left out in silence: that a site has them is private, and leaving each
    one out for its own sake keeps neighbouring data sets neighbours. How many units are left is as private, and the
    run's labels are the coordinator's choice: nothing public may depend on it, not even whether any is left.
    """
    known = set(labels)
    kept = [i for i, label in enumerate(data.labels) if label in known]
    if len(kept) == len(data.labels):
        return data
    return _subset(data, kept)


def split_holdout(data: UnitData, share: float, key_file: Path) -> tuple[UnitData, UnitData | None]:
    """Return the units to train on and, if `share` is not 0, those held out for evaluation.

    Which side a unit falls on is a keyed hash of its own records alone: it stays there when other units come
    or go, and neighbouring data sets stay neighbours. Raises DataError when one side is empty.
    """
    if share == 0.0:
        return data, None
    key = _secret(key_file)
    kept: tuple[list[int], list[int]] = ([], [])
    for records in data.records_by_unit():
        mac = hmac.new(key, b"holdout", hashlib.sha256)
        _absorb(mac, (part for i in records.tolist() for part in (data.texts[i], data.labels[i])))
        held = int.from_bytes(mac.digest()[:8], "big") < share * 2**64
        kept[held].extend(records.tolist())
    if not kept[0] or not kept[1]:
        raise DataError(
            f"[data] holdout = {share:g} leaves one side without a unit", fix="choose another share, or 0 for none"
        )
    return _subset(data, sorted(kept[0])), _subset(data, sorted(kept[1]))


def _subset(data: UnitData, kept: list[int]) -> UnitData:
    """The records `kept`, their units numbered anew."""
    owners, units = np.unique(np.asarray(data.unit_of_record)[np.array(kept, dtype=np.intp)], return_inverse=True)
    return UnitData(
        texts=tuple(data.texts[i] for i in kept),
        labels=tuple(data.labels[i] for i in kept),
        unit_of_record=units.astype(np.int64),
        units=len(owners),
        fingerprint=data.fingerprint,
    )


def fingerprint(rows: Iterable[Sequence[str]], key_file: Path) -> str:
    """Return `hmac-sha256:<hex>` over the cells of the usable rows, keyed by the site's secret.

    It is stored in the ledger, which others read: without a key anyone could test guesses of small tables. The order
    of rows, and of cells in a row, makes no difference, nor does how many rows of one unit are used: so the same data
    under another name are recognised. Equality is all that it tells, not overlap.
    """
    key = _secret(key_file)
    found = []
    for row in rows:
        mac = hmac.new(key, b"record", hashlib.sha256)
        _absorb(mac, sorted(cell.strip() for cell in row if cell.strip()))
        found.append(mac.digest())
    return f"hmac-sha256:{hmac.new(key, b''.join(sorted(found)), hashlib.sha256).hexdigest()}"


def _secret(key_file: Path) -> bytes:
    try:
        return bytes.fromhex(key_file.read_text("ascii"))
    except (OSError, ValueError) as error:
        raise DataError(f"{key_file} cannot be used", fix="restore it from a backup of the site's keys") from error


def _absorb(mac: hmac.HMAC, parts: Iterable[str]) -> None:
    """Feed texts into `mac`, each with its length before it."""
    for part in parts:
        encoded = part.encode("utf-8")
        mac.update(len(encoded).to_bytes(8, "big"))
        mac.update(encoded)
