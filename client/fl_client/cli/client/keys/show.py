"""`fl-client keys show`: print the site's public key, and write it to keys/signing.pub.

An auditor pins the ledger by it (`fl-audit verify --public-key`): tell it by another way than the ledger.
"""

from __future__ import annotations

import argparse

from fl_client.cli.client.options import add_common, home_of
from fl_shared.cli.output import print_json
from fl_shared.identity.fingerprints import grouped_key

EXAMPLES = """
fl-client keys show --site hospital-001
fl-client keys show --site hospital-001 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)


def run(arguments: argparse.Namespace) -> int:
    """Print it."""
    home = home_of(arguments)
    from fl_client.identity.keys import publish

    key = publish(home)
    if arguments.json:
        print_json({"signing_key": key, "file": str(home.public_key)})
        return 0
    print(key)
    print(f"to be read out  {grouped_key(key)}")
    print(f"in the file     {home.public_key}")
    return 0
