"""What the verbs of `fl-client` have in common: the site and its home, output, a log file."""

from __future__ import annotations

import argparse
import os

from fl_client.site.home import SiteHome
from fl_shared.cli.completion import known_sites
from fl_shared.cli.verbs import add_json, add_quiet, argument, path
from fl_shared.errors import ConfigError
from fl_shared.runtime.logs import set_up


def add_site(parser: argparse.ArgumentParser) -> None:
    """Add `--site` and `--home`."""
    argument(
        parser, "--site", default=os.environ.get("FL_SITE"), completer=known_sites,
        help="the site's id, e.g. hospital-001 [FL_SITE]",
    )  # fmt: skip
    parser.add_argument("--home", type=path, default=None, help="its directory [FL_CLIENT_HOME, ~/.concordat/site/ID]")


def add_common(parser: argparse.ArgumentParser) -> None:
    """Add `--site`, `--home`, `--json` and `--quiet`."""
    add_site(parser)
    add_json(parser)
    add_quiet(parser)


def home_of(arguments: argparse.Namespace) -> SiteHome:
    """The home of the site that is named; ConfigError when none is."""
    if not arguments.site:
        raise ConfigError("no site was named", fix="add --site ID, or set FL_SITE")
    return SiteHome.locate(arguments.site, arguments.home)


def log_to_file(home: SiteHome, arguments: argparse.Namespace) -> None:
    """Let the verb log to a file of its own in the home."""
    verb = arguments.verb
    set_up(verb, site=arguments.site, file=home.logs / f"{verb}.jsonl", terminal=None, withhold=True, rotate=True)
