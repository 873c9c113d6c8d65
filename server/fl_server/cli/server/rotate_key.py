"""`fl-server rotate-key`: change the key that signs orders.

The old key vouches for the new one; sites follow by themselves and accept the old key for the grace. Nothing needs to
be restarted.
"""

from __future__ import annotations

import argparse

from fl_server.access.log import local_user
from fl_server.cli.server.certificates import opened
from fl_server.cli.server.options import add_common
from fl_server.cli.show import moment
from fl_server.identity.rotation import DAY_S, GRACE_S, rotate
from fl_shared.cli.output import print_json
from fl_shared.identity.fingerprints import grouped_key

EXAMPLES = """
fl-server rotate-key --grace-days 14
fl-server rotate-key --grace-days 0 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument(
        "--grace-days", type=float, default=GRACE_S / DAY_S,
        help="how long orders of the old key stay good, default %(default)g; 0 when it may have been copied",
    )  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Change it, and record that."""
    at = opened(arguments)
    with at.log.recorded(local_user(), "key rotate", {"grace_days": float(arguments.grace_days)}):
        change = rotate(at.home, arguments.grace_days * DAY_S)
    body = change["body"]
    if arguments.json:
        print_json(change)
        return 0
    print("orders are signed by a new key from now on")
    print(f"  new key  {grouped_key(body['new_key'])}")
    print(f"  old key  {grouped_key(change['key'])}; good until {moment(body['old_until'])}")
    return 0
