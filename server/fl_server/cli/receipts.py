"""`fl-admin receipts export`: the sites' signed receipts, in the file that `fl-audit reconcile` and `verify` read."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fl_server.cli import complete
from fl_server.cli.show import print_json
from fl_server.cli.verbs import add_group, add_verb, argument
from fl_shared.cli.parsers import path
from fl_shared.errors import ConfigError
from fl_shared.files import write_durably
from fl_shared.wire import control_pb2 as pb
from fl_shared.wire.control_pb2_grpc import ControlStub


def add(groups: Any) -> None:
    """Add the group."""
    verbs = add_group(groups, "receipts", "what sites signed about their rounds")
    export = add_verb(
        verbs, "export", _export, "write receipts to a file for an auditor",
        more="The file is what `fl-audit reconcile --receipts` and `fl-audit verify --receipts` read.",
        examples="fl-admin receipts export --site hospital-001 --out receipts.json\n"
        "fl-admin receipts export --run demo --out demo-receipts.json",
    )  # fmt: skip
    argument(export, "--site", default="", metavar="SITE", completer=complete.sites, help="only this site's")
    argument(export, "--run", default="", metavar="RUN", completer=complete.runs, help="only this run's")
    argument(export, "--out", type=path, required=True, metavar="FILE", completer=complete.files, help="where to write")
    export.add_argument("--force", action="store_true", help="replace the file")


def _export(stub: ControlStub, arguments: argparse.Namespace) -> int:
    from fl_shared.ledger.receipts import FORMAT, Kept  # SQL and all; TAB must not wait for it

    out: Path = arguments.out
    if out.exists() and not arguments.force:
        raise ConfigError(f"{out} exists", fix="choose another --out, or add --force")
    # A name that does not exist would look like a site without receipts.
    if arguments.site:
        stub.ShowSite(pb.SiteRequest(site=arguments.site))
    if arguments.run:
        stub.ShowRun(pb.RunRequest(run=arguments.run))
    kept = [
        Kept(json.loads(each.document_json), each.received_at)
        for each in stub.ListReceipts(pb.ListReceiptsRequest(site=arguments.site, run=arguments.run))
    ]
    document = {"format": FORMAT, "receipts": [each.to_dict() for each in kept]}
    try:
        write_durably(out, json.dumps(document, sort_keys=True).encode("utf-8"), mode=0o644)
    except OSError as error:
        raise ConfigError(f"{out}: {error.strerror}", fix="choose another --out") from error
    sites = sorted({str(each.claims.get("site")) for each in kept})
    if arguments.json:
        print_json({"file": str(out), "receipts": len(kept), "sites": sites})
    else:
        print(f"wrote {out}: {len(kept)} receipts of {len(sites)} sites")
    return 0
