"""`fl-audit export`: a bundle for an outside auditor, who checks it offline with public keys alone."""

from __future__ import annotations

import argparse
from pathlib import Path

from fl_shared.audit.source import add_source, open_ledger
from fl_shared.cli.output import command, print_json
from fl_shared.cli.verbs import add_json
from fl_shared.ledger import bundle, receipts

EXAMPLES = """
fl-audit export --site hospital-001 --out hospital-001.zip
fl-audit export --site hospital-001 --receipts receipts.json --out hospital-001.zip
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser)
    parser.add_argument("--out", required=True, metavar="FILE", help="the bundle to write, e.g. hospital-001.zip")
    parser.add_argument("--receipts", metavar="FILE|URL", help="the coordinator's receipts, to be packed with it")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write the bundle and say what is in it."""
    path = Path(arguments.out)
    with open_ledger(arguments) as ledger:
        stored = receipts.load(arguments.receipts, ledger.site) if arguments.receipts else []
        about = bundle.write(ledger, path, stored)
    if arguments.json:
        print_json({"bundle": str(path), **about})
        return 0
    print(f"{path}: {about['entries']} entries and {about['receipts']} receipts of {about['site']}")
    print(f"head         {about['head']}")
    print(f"merkle root  {about['merkle_root']}")
    print(f"check it     {command('fl-audit', 'verify', path, '--public-key', about['public_keys'][0])}")
    print("             (tell the auditor the key by another way than this file)")
    return 0
