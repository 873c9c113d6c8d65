"""`fl-audit statement`: a signed privacy statement as PDF, HTML and JSON, for a regulator, a board or a patient.

The ledger is verified first; nothing is stated about one that is not intact. `--check` verifies a statement that
somebody else made.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fl_shared.audit.checkpoints import pins
from fl_shared.audit.report import facts, html, page, pdf
from fl_shared.audit.report.stated import stated_of
from fl_shared.audit.source import add_source, home_of, public_key, reachable, summary
from fl_shared.canonical import file_sha256, parse_json, sha256_hex
from fl_shared.cli.extras import require
from fl_shared.cli.output import print_json, working
from fl_shared.cli.verbs import add_json, add_quiet, path
from fl_shared.errors import ConfigError, LedgerError, SignatureError, damaged
from fl_shared.identity.signing import SigningKey, open_document, sign_document
from fl_shared.ledger import Ledger, receipts
from fl_shared.ledger.verify import verify_ledger
from fl_shared.names import run_id, site_id

EXAMPLES = """
fl-audit statement --site hospital-001 --out statements
fl-audit statement --site hospital-001 --run demo --empirical canaries.json
fl-audit statement --check statement-hospital-001.json --public-key signing.pub
"""
_LARGEST = 1 << 28


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_source(parser, required=False)
    parser.add_argument("--run", metavar="RUN", help="only this run's mechanisms; cumulative figures stay whole")
    parser.add_argument(
        "--purpose", metavar="TEXT", help="what the data is used for (default: [statement] in site.toml)"
    )
    parser.add_argument("--partner", metavar="NAME", action="append", help="who takes part; give it once for each")
    parser.add_argument("--approved-on", metavar="DATE", help="when the budget was approved, e.g. 2027-01-31")
    parser.add_argument("--out", metavar="DIR", type=path, default=Path(), help="where to write (default: here)")
    parser.add_argument(
        "--key", metavar="FILE", type=path, help="the site's signing key (default: HOME/keys/signing.pem)"
    )
    parser.add_argument("--receipts", metavar="FILE|URL", help="the coordinator's receipts, held against the ledger")
    parser.add_argument("--empirical", metavar="FILE", type=path, help="result of an empirical audit (JSON)")
    parser.add_argument("--check", metavar="FILE", type=path, help="check a statement (.json or .html) instead")
    parser.add_argument("--public-key", metavar="HEX|FILE", help="the site's key as you know it")
    add_quiet(parser)
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Write a statement, or check one."""
    if arguments.check is not None:
        return _check(arguments)
    if not arguments.site:
        raise ConfigError("no site is named", fix="give --site, or --check FILE")
    site = site_id(arguments.site)
    if arguments.run is not None:
        run_id(arguments.run)
    require("report")  # now, and not after the whole ledger was verified
    home = home_of(arguments)
    stated = stated_of(arguments, home)
    key = SigningKey.load(arguments.key or home / "keys" / "signing.pem")
    stored = receipts.load(arguments.receipts, site) if arguments.receipts else []
    with working("verifying the ledger", quiet=arguments.quiet, json=arguments.json), reachable(arguments) as url:
        report = verify_ledger(url, site, public_key=public_key(arguments), checkpoints=pins(stored))
        if not report.intact:
            if report.damaged:
                raise damaged(summary(report.damaged))
            raise LedgerError(
                f"the ledger is not intact: {summary(report.problems)}",
                fix="run fl-audit verify; nothing can be stated about it",
            )
        with Ledger.open(url, None, site) as ledger:
            if ledger.public_key() != key.public_hex:
                raise SignatureError(
                    f"key {key.public_hex[:16]}… does not sign this ledger", fix="give the site's current key"
                )
            body = facts.statement(
                ledger,
                report,
                run=arguments.run,
                home=home if home.is_dir() else None,
                empirical=arguments.empirical,
                stated=stated,
            )
    names = write(sign_document(key, body), key, arguments.out)
    if arguments.json:
        print_json({"site": site, "run": arguments.run, "files": [str(name) for name in names]})
    else:
        for name in names:
            print(name)
    return 0


def write(document: dict[str, Any], key: SigningKey, directory: Path) -> list[Path]:
    """Write the signed body as JSON, HTML and PDF, and a signature over the three files; return the four paths."""
    body = document["body"]
    suffix = f"-{body['run'].replace(':', '_')}" if body["run"] else ""
    stem = f"statement-{body['site']}{suffix}"
    sections = list(page.sections(body))
    contents = {
        f"{stem}.json": (json.dumps(document, indent=1, ensure_ascii=False, sort_keys=True) + "\n").encode(),
        f"{stem}.html": html.render(sections, document).encode(),
        f"{stem}.pdf": pdf.render(sections, document, f"{stem}.json"),
    }
    files = {"kind": "statement-files", "files": {name: sha256_hex(data) for name, data in contents.items()}}
    contents[f"{stem}.signatures.json"] = (json.dumps(sign_document(key, files), indent=1) + "\n").encode()
    directory.mkdir(parents=True, exist_ok=True)
    for name, data in contents.items():
        (directory / name).write_bytes(data)
    return [directory / name for name in contents]


def _check(arguments: argparse.Namespace) -> int:
    """Check a statement's signature, and the files that were signed with it when they lie beside it."""
    path: Path = arguments.check
    known = public_key(arguments)
    if known is None:
        raise ConfigError("whose statement is it?", fix="give --public-key, as the site told you")
    data = path.read_bytes()
    signed = html.embedded(data.decode(errors="replace")) if path.suffix == ".html" else data
    document = parse_json(signed, str(path), limit=_LARGEST)
    body = open_document(document, known)
    if body.get("kind") != "privacy-statement":
        raise SignatureError(f"{path} is signed, but is no privacy statement", fix="give the statement's .json file")
    seal = path.with_name(f"{path.stem}.signatures.json")
    checked: list[str] = []
    if seal.is_file():
        files = open_document(parse_json(seal.read_bytes(), str(seal)), known).get("files", {})
        for name, digest in files.items():
            other = path.parent / Path(name).name
            if other.is_file():
                if file_sha256(other) != digest:
                    raise SignatureError(f"{other} is not the file that was signed", fix="have it sent again")
                checked.append(other.name)
    if path.suffix == ".html" and path.name not in checked:
        raise SignatureError(
            f"{path}: the words of a page are covered by {seal.name} alone", fix="have that file sent, too"
        )
    if arguments.json:
        print_json({"site": body["site"], "run": body["run"], "made_at": body["made_at"], "files": checked})
    else:
        print(f"signed by {known}: statement of {body['site']}, made {body['made_at']}")
        print(f"files that fit: {', '.join(checked) or 'none beside it'}")
    return 0
