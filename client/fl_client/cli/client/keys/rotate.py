"""`fl-client keys rotate`: replace the site's signing key by a new one.

The ledger records the change, signed by the old key and proven by the new one, and the old key is deleted. The agent
must not run, and starts again only when the coordinator knows the new key: enrol with a new token and --force, as this
verb says at its end. A change that was broken off is completed by the next one, or by the agent's next start.
"""

from __future__ import annotations

import argparse

from fl_client.cli.client.options import add_common, home_of
from fl_client.site.config import SiteConfig
from fl_shared.cli.output import print_json
from fl_shared.identity.fingerprints import grouped_key

EXAMPLES = """
fl-client keys rotate --site hospital-001 --by "A. Officer" --reason "yearly"
fl-client keys rotate --site hospital-001 --by "A. Officer" --reason "a disk was lost" --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--by", default="", metavar="NAME", help="who approves")
    parser.add_argument("--reason", default="", metavar="TEXT", help="why")


def run(arguments: argparse.Namespace) -> int:
    """Replace it, and say how the coordinator learns the new one."""
    home = home_of(arguments)
    from fl_client.identity import keys
    from fl_client.identity.enrolment import Coordinator
    from fl_client.site.locks import exclusive

    config = SiteConfig.load(home, arguments.site)
    pinned = Coordinator.load(home)
    home.make()
    with exclusive(home.run / "agent.lock", "keys rotate"):
        change = keys.rotate(home, config.ledger_url, config.site, arguments.by, arguments.reason)
    following = keys.enrol_again(home, pinned)
    if arguments.json:
        body = {"new_key": change.new_key, "old_key": change.old_key, "entry": change.entry, "next": following}
        print_json(body)
        return 0
    print("the ledger is signed by a new key from now on")
    print(f"  new key  {grouped_key(change.new_key)}")
    print(f"  old key  {grouped_key(change.old_key)}; deleted")
    print(f"  entry    {change.entry}")
    print("next: the coordinator does not know it yet, and no agent starts before it does. Ask for a token, then")
    print(f"  {following}")
    print(f"tell your auditor the new key, too: {home.public_key}")
    return 0
