"""Names that become file names, certificate subjects and SQL keys: checked once, here."""

from __future__ import annotations

import re

from fl_shared.errors import ConfigError, shown

ALONE = "alone:"
"""Begins the runs that a site orders from itself; no coordinator's run can have such a name."""
NAME = r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?"


def _check(value: object, kind: str) -> str:
    if not isinstance(value, str) or re.fullmatch(NAME, value) is None:
        raise ConfigError(
            f"{kind} {shown(value)} is not a valid name",
            fix="use 1 to 63 lower-case letters, digits and hyphens, not at either end",
        )
    return value


def site_id(value: object) -> str:
    """A site's name such as `hospital-001`; ConfigError otherwise."""
    return _check(value, "site")


def operator_name(value: object) -> str:
    """The name of an admin or auditor; ConfigError otherwise."""
    return _check(value, "admin or auditor")


def run_name(value: object) -> str:
    """A run's name such as `hospital-demo`; ConfigError otherwise."""
    return _check(value, "run")


def promotion_name(value: object) -> str:
    """The name that an adapter is promoted to, such as `production`; ConfigError otherwise."""
    return _check(value, "promotion")


def run_id(value: object) -> str:
    """A run as the ledger knows it: a run's name, or `alone:NAME` for a site's own baseline."""
    if isinstance(value, str) and value.startswith(ALONE):
        return f"{ALONE}{run_name(value.removeprefix(ALONE))}"
    return run_name(value)
