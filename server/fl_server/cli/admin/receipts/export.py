"""`fl-admin receipts export`: write receipts to a file for an auditor.

The file is what `fl-audit reconcile --receipts` and `fl-audit verify --receipts` read.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from fl_server.cli.admin import complete
from fl_server.cli.admin.options import add_common, connected, require_new, write_file
from fl_shared.cli.output import print_json
from fl_shared.cli.verbs import argument, path
from fl_shared.wire import control_pb2 as pb

EXAMPLES = """
fl-admin receipts export --site hospital-001 --out receipts.json
fl-admin receipts export --run demo --out demo-receipts.json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    argument(parser, "--site", default="", metavar="SITE", completer=complete.sites, help="only this site's")
    argument(parser, "--run", default="", metavar="RUN", completer=complete.runs, help="only this run's")
    argument(parser, "--out", type=path, required=True, metavar="FILE", completer=complete.files, help="where to write")
    parser.add_argument("--force", action="store_true", help="replace the file")


def run(arguments: argparse.Namespace) -> int:
    """Write them."""
    from fl_shared.ledger.receipts import FORMAT, StoredReceipt  # SQL and all; TAB must not wait for it

    out: Path = arguments.out
    with connected(arguments) as stub:
        require_new(out, force=arguments.force)
        # A name that does not exist would look like a site without receipts.
        if arguments.site:
            stub.ShowSite(pb.SiteRequest(site=arguments.site))
        if arguments.run:
            stub.ShowRun(pb.RunRequest(run=arguments.run))
        receipts = [
            StoredReceipt(json.loads(row.document_json), row.received_at)
            for row in stub.ListReceipts(pb.ListReceiptsRequest(site=arguments.site, run=arguments.run))
        ]
    document = {"format": FORMAT, "receipts": [receipt.to_dict() for receipt in receipts]}
    write_file(out, json.dumps(document, sort_keys=True).encode("utf-8"))
    sites = sorted({str(receipt.claims.get("site")) for receipt in receipts})
    if arguments.json:
        print_json({"file": str(out), "receipts": len(receipts), "sites": sites})
    else:
        print(f"wrote {out}: {len(receipts)} receipts of {len(sites)} sites")
    return 0
