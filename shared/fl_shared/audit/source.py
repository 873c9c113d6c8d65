"""Which ledger an auditor means: `--ledger URL`, or the one in a site's home directory."""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fl_shared.cli.completion import completed_by, known_sites
from fl_shared.errors import ConfigError, LedgerError, SignatureError, damaged
from fl_shared.files import sqlite_url
from fl_shared.identity.signing import ed25519_key
from fl_shared.ledger import Ledger, LedgerReader, bundle
from fl_shared.ledger.records import Problem
from fl_shared.ledger.verify import verify_ledger
from fl_shared.names import site_id
from fl_shared.toml import load_toml

HOME_VARIABLE = "FL_CLIENT_HOME"


def add_source(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the options that name a ledger."""
    site = parser.add_argument("--site", required=required, metavar="ID", help="the site, e.g. hospital-001")
    completed_by(site, known_sites)
    parser.add_argument(
        "--home", metavar="DIR", help=f"the site's home (default: ${HOME_VARIABLE} or ~/.concordat/site/ID)"
    )
    parser.add_argument(
        "--ledger", metavar="URL|BUNDLE", help="the ledger's database, or a bundle of fl-audit export; not the home's"
    )


def home_of(arguments: argparse.Namespace) -> Path:
    """Return the site's home directory, which need not exist."""
    chosen = arguments.home or os.environ.get(HOME_VARIABLE)
    if chosen:
        return Path(chosen).expanduser().absolute()
    return Path.home() / ".concordat" / "site" / site_id(arguments.site)


def ledger_url(arguments: argparse.Namespace) -> str:
    """Return the address of the ledger that the options name.

    Raises ConfigError when `site.toml` names none that is text.
    """
    if arguments.ledger:
        return str(arguments.ledger)
    home = home_of(arguments)
    config = home / "site.toml"
    if config.is_file():
        section: Any = load_toml(config).get("ledger", {})
        url = section.get("url") if isinstance(section, dict) else section
        if isinstance(url, str):
            return url
        if url is not None:
            raise ConfigError(f"{config} [ledger]: url is {url!r}", fix="write the database address in quotes")
    return sqlite_url(home / "ledger.sqlite")


@contextlib.contextmanager
def reachable(arguments: argparse.Namespace) -> Iterator[str]:
    """Give the address of the ledger that the options name; a bundle is unpacked for as long as this lasts."""
    path = Path(arguments.ledger) if arguments.ledger and "://" not in arguments.ledger else None
    if path is None:
        yield ledger_url(arguments)
        return
    if not bundle.is_bundle(path):
        raise ConfigError(
            f"--ledger {arguments.ledger!r} is neither a bundle nor a database address",
            fix="give a file of fl-audit export, or sqlite:////path/ledger.sqlite",
        )
    with tempfile.TemporaryDirectory(prefix="concordat-bundle-") as directory:
        yield bundle.unpack(path, Path(directory))


@contextlib.contextmanager
def open_ledger(arguments: argparse.Namespace) -> Iterator[LedgerReader]:
    """Open the ledger for reading, after checking all of it: no figure is shown of a record that is damaged.

    What the undamaged record tells of wrong deeds, such as a grant beyond a ceiling, is `fl-audit verify`'s to name.
    Raises LedgerError that names entry and column when it is damaged.
    """
    site = site_id(arguments.site)
    with reachable(arguments) as url:
        report = verify_ledger(url, site)
        if report.other_site:
            raise LedgerError(
                f"this ledger belongs to site {report.other_site!r}, not {site!r}",
                fix="check --site and the ledger's address",
            )
        if report.damaged:
            raise damaged(summary(report.damaged))
        with Ledger.open(url, None, site) as ledger:
            yield ledger


def summary(problems: Sequence[Problem]) -> str:
    """Return the first problem in words, and how many more there are."""
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0].message}{more}"


def public_key(arguments: argparse.Namespace) -> str | None:
    """Return the site's public key (64 hex digits) from `--public-key`; None when it was not given.

    Raises ConfigError for a key that is not 64 hex digits.
    """
    return None if arguments.public_key is None else key_text(str(arguments.public_key))


def home_key(arguments: argparse.Namespace) -> str | None:
    """Return the key in the home's `keys/signing.pub`, for the home's own ledger; None when it cannot be read."""
    file = home_of(arguments) / "keys" / "signing.pub"
    if arguments.ledger or not os.access(file, os.R_OK):
        return None
    return key_text(str(file))


def key_text(value: str) -> str:
    """Return the key in 64 hex digits or in the file that holds them; ConfigError for anything else."""
    source = f"the file {value}" if Path(value).is_file() else "--public-key"
    text = Path(value).read_text(encoding="utf-8", errors="replace") if Path(value).is_file() else value
    public_hex = text.strip().lower()
    try:
        ed25519_key(public_hex)
    except SignatureError as error:
        raise ConfigError(
            f"{source} holds no Ed25519 public key: {error.message}", fix="give 64 hex digits or the file with them"
        ) from error
    return public_hex
