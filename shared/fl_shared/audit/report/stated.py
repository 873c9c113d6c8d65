"""What a statement repeats on the site's word, because no ledger knows it: institution, purpose, partners, approval."""

from __future__ import annotations

import argparse
import datetime as dt
from pathlib import Path
from typing import Any

from fl_shared.errors import ConfigError
from fl_shared.fields import Fields, load_toml

SECTION = "statement"
NOT_STATED = "not stated"


def read_stated(fields: Fields) -> dict[str, Any]:
    """Read the [statement] table of a site.toml; None for what is absent. ConfigError names a wrong field."""
    found: dict[str, Any] = {name: fields.text(name, default=None) for name in ("institution", "purpose", "contact")}
    found["partners"] = list(fields.texts("partners", high=200)) if fields.has("partners") else None
    found["approved_on"] = fields.text("approved_on", default=None)
    if found["approved_on"] is not None:
        found["approved_on"] = _day(found["approved_on"], f"[{SECTION}] approved_on")
    fields.done()
    return found


def stated_of(arguments: argparse.Namespace, home: Path) -> dict[str, Any]:
    """Return what the options say, and where they say nothing what [statement] in the home's site.toml says."""
    config = home / "site.toml"
    table = load_toml(config).get(SECTION, {}) if config.is_file() else {}
    found = read_stated(Fields(table, f"{config} [{SECTION}]"))
    given = {
        "purpose": arguments.purpose,
        "partners": arguments.partner or None,
        "approved_on": None if arguments.approved_on is None else _day(arguments.approved_on, "--approved-on"),
    }
    return found | {name: value for name, value in given.items() if value is not None}


def _day(text: str, where: str) -> str:
    try:
        return dt.date.fromisoformat(text).isoformat()
    except ValueError as error:
        raise ConfigError(f"{where} is {text!r}, not a date", fix='write a date, such as "2027-01-31"') from error
