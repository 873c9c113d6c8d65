"""Load a site's private table into `UnitData`: texts, labels, and which privacy unit each row belongs to."""

from __future__ import annotations

import hashlib
import hmac
import logging
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fl_client.data.spellings import UnitIds, folded
from fl_client.data.tables import read_columns
from fl_client.data.units import UnitData
from fl_client.site.config import DataConfig
from fl_shared.errors import DataError

log = logging.getLogger("fl_client.data")

_SHORT = 64
_MARGIN = 4  # how many times as many units as `[data] expected_units` there may be


def load_unit_data(config: DataConfig, fingerprint_key: Path) -> UnitData:
    """Return the private data that `[data]` describes.

    Rows without text or label are left out; of one unit the first `max_records_per_unit` rows are used.
    Both rules look at one unit alone, so that they change nothing about neighbouring data sets. Raises
    DataError when the table cannot be used, and when two ids may be one unit written in two ways.
    """
    names = list(dict.fromkeys([*config.text_columns, config.label_column]))
    if config.unit_column is not None and config.unit_column not in names:
        names.append(config.unit_column)
    columns = read_columns(config.path, names, config.encoding)
    texts = _texts([columns[name] for name in config.text_columns], config.text_columns)
    labels = [label.strip() for label in columns[config.label_column]]
    owners = columns[config.unit_column] if config.unit_column is not None else None
    cells = zip(*(columns[name] for name in (*config.text_columns, config.label_column)), strict=True)
    usable = [row for row, text, label in zip(cells, texts, labels, strict=True) if text and label]
    unit_of_record, kept, left_out = _units(texts, labels, owners, config)
    if not kept:
        raise DataError(f"{config.path}: no row has both a text and a label", fix="check the columns in [data]")
    texts = [texts[i] for i in kept]
    labels = [labels[i] for i in kept]
    log.info("data set %s loaded, kept per %s", config.name, config.privacy_unit)
    units = int(unit_of_record.max()) + 1
    if units > most_units(config, units):
        raise DataError(
            f"{config.path}: there are more than {_MARGIN} times as many units as [data] expected_units = "
            f"{config.expected_units}",
            fix="set expected_units to a public round figure that is nearer: the noise's rounding is paid for so many",
        )
    return UnitData(
        texts=tuple(texts),
        labels=tuple(labels),
        unit_of_record=unit_of_record,
        units=units,
        fingerprint=fingerprint(usable, fingerprint_key),
        left_out=left_out,
    )


def most_units(config: DataConfig, units: int) -> int:
    """A public bound on the number of units, however many there are: nothing exact may follow from these."""
    return units if config.expected_units is None else _MARGIN * config.expected_units


def _texts(columns: list[list[str]], names: tuple[str, ...]) -> list[str]:
    if len(columns) == 1:
        return [text.strip() for text in columns[0]]
    return [
        "; ".join(f"{name}: {value.strip()}" for name, value in zip(names, row, strict=True) if value.strip())
        for row in zip(*columns, strict=True)
    ]


def _units(
    texts: list[str], labels: list[str], owners: list[str] | None, config: DataConfig
) -> tuple[NDArray[np.int64], list[int], tuple[tuple[str, int], ...]]:
    """Return the unit (0..units-1) of each kept row `[kept]`, the kept rows' numbers, and how many were left out."""
    numbers: dict[str, int] = {}
    used: dict[int, int] = {}
    units: list[int] = []
    kept: list[int] = []
    left_out = {"without text": 0, "without label": 0, f"beyond {config.max_records_per_unit} of one unit": 0}
    without_text, without_label, beyond = left_out
    written = UnitIds(config.path, config.unit_column or "", config.privacy_unit)
    for row, (text, label) in enumerate(zip(texts, labels, strict=True)):
        if not text or not label:
            left_out[without_label if text else without_text] += 1
            continue
        if owners is None:
            unit = len(units)
        else:
            unit = numbers.setdefault(written.checked(owners[row], row + 1), len(numbers))
            used[unit] = used.get(unit, 0) + 1
            if used[unit] > config.max_records_per_unit:
                left_out[beyond] += 1
                continue
        units.append(unit)
        kept.append(row)
    return np.asarray(units, dtype=np.int64), kept, tuple((why, rows) for why, rows in left_out.items() if rows)


def row_report(data: UnitData, config: DataConfig) -> str:
    """What is used of the table, in one line for whoever sits at the site."""
    rows = len(data.texts)
    total = rows + sum(number for _, number in data.left_out)
    text = f"{config.path.name}: {rows} rows used of {total}, {data.units} units (each a {config.privacy_unit})"
    if data.left_out:
        text += "; left out: " + ", ".join(f"{number} {why}" for why, number in data.left_out)
    return text


def split_holdout(data: UnitData, share: float, key_file: Path) -> tuple[UnitData, UnitData | None]:
    """Return the units to train on and, if `share` is not 0, those held out for evaluation.

    Which side a unit falls on is a keyed hash of its own records alone: it stays there when other units come
    or go, and neighbouring data sets stay neighbours. Raises DataError when one side is empty.
    """
    if share == 0.0:
        return data, None
    key = _secret(key_file)
    parts: tuple[list[int], list[int]] = ([], [])
    for records in data.records_by_unit():
        mac = hmac.new(key, b"holdout", hashlib.sha256)
        _absorb(mac, (part for i in records.tolist() for part in (data.texts[i], data.labels[i])))
        held_out = int.from_bytes(mac.digest()[:8], "big") < share * 2**64
        parts[held_out].extend(records.tolist())
    if not parts[0] or not parts[1]:
        raise DataError(
            f"[data] holdout = {share:g} leaves one side without a unit", fix="choose another share, or 0 for none"
        )
    return data.part(sorted(parts[0])), data.part(sorted(parts[1]))


def fingerprint(rows: Iterable[Sequence[str]], key_file: Path) -> str:
    """Return `hmac-sha256:<hex>` over the cells of the usable rows, keyed by the site's secret.

    It is stored in the ledger, which others read: without a key anyone could test guesses of small tables. The order
    of rows, and of cells in a row, makes no difference, nor does how many rows of one unit are used, or rows that are
    there twice, or case, blanks, line ends and Unicode forms, which exports change: so the same data under another
    name are recognised. Equality is all that it tells, not overlap.
    """
    key = _secret(key_file)
    digests = []
    for row in rows:
        mac = hmac.new(key, b"record", hashlib.sha256)
        _absorb(mac, sorted(same for cell in row if (same := _as_in_any_export(cell))))
        digests.append(mac.digest())
    return f"hmac-sha256:{hmac.new(key, b''.join(sorted(set(digests))), hashlib.sha256).hexdigest()}"


def _as_in_any_export(cell: str) -> str:
    if len(cell) < _SHORT:
        return folded(cell)  # labels and numbers, which are written in more ways than texts
    return "".join(unicodedata.normalize("NFKC", cell).casefold().split())


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
