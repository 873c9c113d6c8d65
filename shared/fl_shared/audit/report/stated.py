"""What a statement repeats on the site's word, because no ledger knows it: institution, purpose, partners, approval."""

from __future__ import annotations

import argparse
import datetime as dt
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from fl_shared.declaration import Document
from fl_shared.errors import ConfigError
from fl_shared.fields import Named, Text, Texts
from fl_shared.toml import load_toml

SECTION = "statement"
NOT_STATED = "not stated"


def _day(value: object) -> str:
    try:
        return dt.date.fromisoformat(value if isinstance(value, str) else "").isoformat()
    except ValueError as error:
        raise ConfigError("", fix='write a date in quotes, such as "2027-01-31"') from error


@dataclass(frozen=True)
class Statement(Document):
    """[statement]: what `fl-audit statement` repeats on the site's word."""

    institution: Text | None = None
    """The institution's name."""
    purpose: Text | None = None
    """What the model is trained for."""
    contact: Text | None = None
    """Whom to ask, for example the data protection officer."""
    partners: Annotated[tuple[str, ...], Texts(1, 200)] | None = None
    """The other institutions that take part."""
    approved_on: Annotated[str, Named(_day, r"^\d{4}-\d{2}-\d{2}$")] | None = None
    """The day on which the budget was approved."""


def stated_of(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Return what the options say, and where they say nothing what [statement] in the home's site.toml says."""
    config = home / "site.toml"
    table = load_toml(config).get(SECTION, {}) if config.is_file() else {}
    configured = Statement.from_dict(table, where=f"{config} [{SECTION}]").to_dict()
    options = {
        "purpose": arguments.purpose,
        "partners": arguments.partner or None,
        "approved_on": None if arguments.approved_on is None else _approved_on(arguments.approved_on),
    }
    return configured | {name: value for name, value in options.items() if value is not None}


def _approved_on(text: str) -> str:
    try:
        return _day(text)
    except ConfigError as error:
        fix = 'write a date, such as "2027-01-31"'
        raise ConfigError(f"--approved-on is {text!r}, not a date", fix=fix) from error
