"""`fl-client`: enrol a site, check it, run its agent, train alone, show its state."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import os
import shlex
import signal
import sys
from collections.abc import Sequence

from fl_client.cli import schema
from fl_client.site.address import server_url
from fl_client.site.config import SiteConfig, template
from fl_client.site.home import SiteHome
from fl_shared.cli.completion import complete, completed_by, known_sites
from fl_shared.cli.console import command, working
from fl_shared.cli.entry import cli_main
from fl_shared.cli.extras import require
from fl_shared.cli.parsers import add_quiet, add_version, describe, path
from fl_shared.errors import ConfigError
from fl_shared.files import check_grpc_socket, write_durably
from fl_shared.identity.fingerprints import spoken, spoken_key
from fl_shared.runtime.logs import FORMATS, default_format, set_up
from fl_shared.runtime.offline import stay_offline
from fl_shared.runtime.private_files import create_privately

EXAMPLES = """\
examples:
  fl-client enroll --site hospital-001 --server https://coordinator.example:9443 --token ct1....
  fl-client check --site hospital-001          # a dry run: each line a pass or the fix
  fl-client check --site hospital-001 --spec spec.toml     # and whether it could take part in this run
  fl-client --site hospital-001                # the agent (Ctrl-C or SIGTERM ends it in good order)
  fl-client status --site hospital-001 --json
  fl-client resume --site hospital-001 demo --by "A. Officer" --reason "the driver was updated"
  fl-client train-alone --site hospital-001 --spec spec.toml --out alone/

Each verb has its own --help with examples.

environment: FL_SITE, FL_SERVER, FL_TOKEN and FL_CLIENT_HOME stand in for --site, --server, --token, --home;
  FL_LOG_FORMAT=json makes the agent's output JSON lines, as in its log file
TAB completes verbs, options and sites: eval "$(register-python-argcomplete fl-client)"

exit codes: 0 success, 2 wrong configuration or a missing package, 10 policy, 11 budget, 12 signature, 13 ledger,
  14 model, 15 data, 16 transport, 17 enrolment, 18 run, 19 engine, 70 a defect, 74 the operating system said no,
  130 Ctrl-C, 141 the output's reader left
"""


def parser() -> argparse.ArgumentParser:
    """Return the command line's parser."""
    top = argparse.ArgumentParser(
        prog="fl-client",
        description="The site's half of Concordat. Without a verb: run the agent.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_version(top)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, summary: str, examples: str, more: str = "", *, prints: bool = True) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=summary)
        describe(made, summary, examples, more)
        site = made.add_argument(
            "--site", default=os.environ.get("FL_SITE"), help="the site's id, e.g. hospital-001 [FL_SITE]"
        )
        completed_by(site, known_sites)
        made.add_argument(
            "--home", type=path, default=None, help="its directory [FL_CLIENT_HOME, ~/.concordat/site/ID]"
        )
        if prints:
            made.add_argument("--json", action="store_true", help="print one JSON object")
            add_quiet(made)
        return made

    agent = verb(
        "run", "run the agent and the SuperNode (the default)",
        "fl-client --site hospital-001\nfl-client run --site hospital-001 --log-format json", prints=False,
    )  # fmt: skip
    agent.add_argument(
        "--log-format",
        choices=FORMATS,
        default=default_format(),
        help="of the output; the log file is always JSON lines [FL_LOG_FORMAT]",
    )
    enroll = verb(
        "enroll", "make the site's keys and get its certificate with a one-time token",
        "fl-client enroll --site hospital-001 --server https://coordinator.example:9443 --token ct1....\n"
        "fl-client enroll --site hospital-001 --server https://10.0.0.5:9443 --token ct1.... --force --json",
        "The keys are made here and never leave. A failed attempt can be repeated.",
    )  # fmt: skip
    enroll.add_argument(
        "--server", default=os.environ.get("FL_SERVER"), help="https://HOST:PORT of the gateway [FL_SERVER]"
    )
    enroll.add_argument("--token", default=os.environ.get("FL_TOKEN"), help="from `fl-admin sites invite` [FL_TOKEN]")
    enroll.add_argument("--force", action="store_true", help="replace the certificate of an enrolled site")
    check = verb(
        "check", "dry run: packages, config, data, model, policy, budget, server; each a pass or the fix",
        "fl-client check --site hospital-001\nfl-client check --site hospital-001 --spec spec.toml --json",
        "Nothing is written and nothing is spent. Exit code 2 when a line fails.",
    )  # fmt: skip
    check.add_argument(
        "--spec", type=path, default=None, help="a run's spec: also say whether this site could take part in it"
    )
    resume = verb(
        "resume", "take part again in a run that this site left after a failure",
        'fl-client resume --site hospital-001 demo --by "A. Officer" --reason "the driver was updated"\n'
        'fl-client resume --site hospital-001 --ledger --by "A. Officer" --reason "restored from a backup" --json',
        "The ledger records who said so.",
    )  # fmt: skip
    resume.add_argument("run", nargs="?", default="", metavar="RUN", help="the run, as `fl-client status` lists it")
    resume.add_argument(
        "--ledger", action="store_true",
        help="instead of a run: go on with an old copy of the ledger, after entering what this home knows was spent",
    )  # fmt: skip
    resume.add_argument("--by", default="", metavar="NAME", help="who confirms")
    resume.add_argument("--reason", default="", metavar="TEXT", help="why it may go on: what failed, what was done")
    verb(
        "status", "show enrolment, whether the agent runs, and what the ledger says",
        "fl-client status --site hospital-001\nfl-client status --site hospital-001 --json",
    )  # fmt: skip
    alone = verb(
        "train-alone", "train a run's spec at this site alone, charged like a federated run",
        "fl-client train-alone --site hospital-001 --spec spec.toml --out alone/",
    )  # fmt: skip
    alone.add_argument("--spec", type=path, required=True, help="the run's spec, as for `fl-admin runs launch`")
    alone.add_argument("--out", type=path, required=True, help="directory for adapter.safetensors and receipts.json")
    judge = verb(
        "evaluate", "evaluate an adapter on the private hold-out, with noise and an entry in the ledger",
        "fl-client evaluate --site hospital-001 --spec spec.toml --adapter demo.safetensors\n"
        "fl-client evaluate --site hospital-001 --spec spec.toml --adapter demo.safetensors --noise 20 --json",
    )  # fmt: skip
    judge.add_argument("--spec", type=path, required=True, help="the spec that the adapter was trained with")
    judge.add_argument("--adapter", type=path, required=True, help="from `fl-admin adapters export` or train-alone")
    judge.add_argument("--noise", type=float, default=10.0, help="noise multiplier, default 10; less costs more")
    judge.add_argument(
        "--force", action="store_true", help="be charged even where the noise is likely to hide the figures"
    )
    schema.add(verbs)
    node = verbs.add_parser("supernode", help="run only the untrusted half, as another user (see deploy/)")
    describe(
        node, "run only the untrusted half, as another user",
        "fl-client supernode --directory /run/concordat/hospital-001/supernode", "It needs its own directory alone.",
    )  # fmt: skip
    node.add_argument("--directory", type=path, required=True, help="the site's supernode directory")
    return top


def with_verb(arguments: Sequence[str]) -> list[str]:
    """The arguments, with the verb `run` in front when they name none."""
    if not arguments or (arguments[0].startswith("-") and arguments[0] not in ("-h", "--help", "--version")):
        return ["run", *arguments]
    return list(arguments)


def run(argv: Sequence[str] | None) -> int:
    """Parse and run one verb; return the exit code."""
    made = parser()
    complete(made)
    options = made.parse_args(with_verb(sys.argv[1:] if argv is None else argv))
    if options.verb == "supernode":
        from fl_client.node.supernode import run_alone

        return run_alone(options.directory)
    if options.verb == "schema":
        return schema.show(options.document)
    if not options.site:
        raise ConfigError("no site was named", fix="add --site ID, or set FL_SITE")
    home = SiteHome.locate(options.site, options.home)
    actions = {"run": _run, "enroll": _enroll, "check": _check, "status": _status, "train-alone": _alone}
    actions |= {"evaluate": _evaluate, "resume": _resume}
    return actions[options.verb](home, options)


def _run(home: SiteHome, options: argparse.Namespace) -> int:
    require("client")  # now, and not when a helper of the agent needs it
    from fl_client.identity.enrolment import Coordinator

    config = SiteConfig.load(home, options.site)
    Coordinator.load(home)
    home.make()
    set_up(
        "agent", site=options.site, file=home.logs / "agent.jsonl", terminal=options.log_format, stream=sys.stdout,
        withhold=True, rotate=True,
    )  # fmt: skip
    from fl_client.agent.main import run_agent

    return run_agent(home, config)


def _enroll(home: SiteHome, options: argparse.Namespace) -> int:
    for name, value in (("--server", options.server), ("--token", options.token)):
        if not value:
            raise ConfigError(f"{name} is missing", fix=f"add {name}, or set FL_{name[2:].upper()}")
    from fl_client.identity.enrolment import enrol, own_fingerprints

    fix = "choose a --home with a shorter path and no comma; nothing was made, and the token is still good"
    check_grpc_socket(home.socket, fix=fix)
    address = server_url(options.server)
    with working(f"asking {address} for a certificate", quiet=options.quiet, json=options.json):
        pinned = enrol(home, site=options.site, server=address, token=options.token, force=options.force)
    made = not home.config.exists()
    if made:
        text = template(options.site, address)
        write_durably(home.config, text.encode("utf-8"))
    ours = own_fingerprints(home)
    if options.json:
        facts = {
            "site": pinned.site,
            "server": pinned.server,
            "home": str(home.root),
            "coordinator_key": pinned.coordinator_key,
            "ca_sha256": pinned.ca_sha256,
            "signing_key": ours.signing_key,
            "certificate_fingerprint": ours.certificate,
            "template_written": made,
        }
        print(json.dumps(facts, indent=2))
        return 0
    print(f"{pinned.site} is enrolled at {pinned.server}; its keys were made here and stay in {home.root}")
    print("compare by telephone with what `fl-admin sites show` prints there:")
    print(f"  coordinator's key   {spoken_key(pinned.coordinator_key)}")
    print(f"  CA certificate      {spoken(pinned.ca_sha256)}")
    print(f"  site's key          {spoken_key(ours.signing_key)}")
    print(f"  site's certificate  {spoken(ours.certificate)}")
    if options.force:
        print("restart the site's agent if it runs: it takes up the new certificate and node key at its start")
    if made:
        print(f"next: edit {shlex.quote(str(home.config))}")
    where = ["--home", str(home.root)] if options.home else []
    print(f"then: {command('fl-client', 'check', '--site', pinned.site, *where)}")
    return 0


def _check(home: SiteHome, options: argparse.Namespace) -> int:
    from fl_client.agent.check import run_checks
    from fl_shared.documents.spec import RunSpec

    spec = RunSpec.from_toml(options.spec) if options.spec else None
    results = []
    checks = run_checks(home, options.site, spec)
    while True:
        with working("checking", quiet=options.quiet, json=options.json):
            result = next(checks, None)
        if result is None:
            break
        results.append(result)
        if not options.json:
            print(f"{'PASS' if result.ok else 'FAIL'}  {result.name:<11} {result.message}", flush=True)
            if result.fix:
                print(f"      {'fix:':<11} {result.fix}", flush=True)
    ok = all(result.ok for result in results)
    if options.json:
        print(json.dumps({"site": options.site, "ok": ok, "checks": [r.to_dict() for r in results]}, indent=2))
    return 0 if ok else 2


def _status(home: SiteHome, options: argparse.Namespace) -> int:
    from fl_client.agent.status import status_of
    from fl_shared.ledger.suspension import resume_command

    found = status_of(home, options.site)
    if options.json:
        print(json.dumps(found, indent=2))
    else:
        for name, value in found.items():
            if name == "suspended":
                for run, why in value.items():
                    print(f"{name:<10} {run}: {why}; when it may go on: {resume_command(options.site, run)}")
                continue
            if isinstance(value, list):
                value = "; ".join(value) or "none"
            if isinstance(value, dict):
                value = ", ".join(
                    f"{key} {item:g}" if isinstance(item, float) else f"{key} {item}" for key, item in value.items()
                )
            print(f"{name:<10} {value}")
    return 0


def _resume(home: SiteHome, options: argparse.Namespace) -> int:
    from fl_client.agent.resume import accept_ledger
    from fl_client.agent.site import open_ledger
    from fl_shared.ledger.suspension import confirm_run, resume_command

    if bool(options.run) == options.ledger:
        raise ConfigError("name one run, or give --ledger", fix=resume_command(options.site, "RUN"))
    config = SiteConfig.load(home, options.site)
    if options.ledger:
        entered = accept_ledger(home, config, options.by, options.reason)
        done: dict[str, int | str] = {"entered": entered}
        said = f"the ledger is accepted; {entered} forgotten releases were entered again"
    else:
        ledger, _ = open_ledger(home, config)
        try:
            entry = confirm_run(ledger, options.run, options.by, options.reason)
        finally:
            ledger.close()
        done = {"run": options.run, "entry": entry.id}
        said = f"{options.run}: this site takes part again (ledger entry {entry.seq}); what failed stays charged"
    print(json.dumps(done, indent=2) if options.json else said)
    return 0


def _log_to_file(home: SiteHome, site: str, verb: str) -> None:
    set_up(verb, site=site, file=home.logs / f"{verb}.jsonl", terminal=None, withhold=True, rotate=True)


def _alone(home: SiteHome, options: argparse.Namespace) -> int:
    require("client")  # before a reservation that would be charged for it
    from fl_client.agent.alone import train_alone
    from fl_client.agent.site import open_site
    from fl_client.site.locks import sole
    from fl_client.tasks.registry import task_of
    from fl_shared.documents.spec import RunSpec
    from fl_shared.identity.signing import SigningKey
    from fl_shared.names import ALONE

    config = SiteConfig.load(home, options.site)
    spec = RunSpec.from_toml(options.spec)
    home.make()
    _log_to_file(home, options.site, "train-alone")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Nobody outside sees when a round of the site's own ends.
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, reply_every_s=0.0))
    order_key = SigningKey.generate()
    with contextlib.ExitStack() as progress, sole(home.run / "agent.lock", "train-alone"):

        def show(what: str) -> None:
            progress.enter_context(working(what, quiet=options.quiet, json=options.json))

        def say(text: str) -> None:
            progress.close()  # one thing at a time on a terminal
            if not options.json:
                print(text, flush=True)
            show("training the next round")

        show("opening ledger, data and model")
        site = open_site(home, config, lambda key: key == order_key.public_hex, namespace=ALONE)
        try:
            say(f"{site.rows}; {task_of(spec).report(site.data)}")
            done = train_alone(site, spec, order_key, options.out, say)
        finally:
            site.close()
    if options.json:
        print(json.dumps(done, indent=2))
    else:
        print(f"adapter {done['adapter']}; epsilon spent {done['epsilon_spent_total']:.3f} at delta {done['delta']:g}")
    return 0


def _evaluate(home: SiteHome, options: argparse.Namespace) -> int:
    require("client")  # before a reservation that would be charged for it
    from fl_client.agent.evaluation import are_usable, evaluate_privately
    from fl_client.agent.site import open_site
    from fl_client.site.locks import sole
    from fl_client.tasks.registry import task_of
    from fl_shared.adapters.safetensors import read_adapter
    from fl_shared.documents.spec import RunSpec

    config = SiteConfig.load(home, options.site)
    spec = RunSpec.from_toml(options.spec)
    task = task_of(spec)
    adapter = read_adapter(options.adapter)
    home.make()
    _log_to_file(home, options.site, "evaluate")
    with (
        sole(home.run / "agent.lock", "evaluate"),
        working("opening ledger, data and model", quiet=options.quiet, json=options.json) as say,
    ):
        site = open_site(home, config, lambda _: False)
        try:
            if not options.json:
                told = f"; {task.report(site.holdout)}" if site.holdout is not None else ""
                print(f"{site.rows}{told}", flush=True)
            say("evaluating on the hold-out")
            document = evaluate_privately(site, spec, adapter, options.noise, force=options.force)
        finally:
            site.close()
    figures = document["body"]["figures"]
    if options.json:
        print(json.dumps(document, indent=2))
    elif not are_usable(figures):
        print("too few units for this noise: no accuracy can be told; it stays charged")
    else:
        print(f"{task.told(figures)}; ledger entry {document['body']['entry_id']}")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the console script."""
    stay_offline()
    create_privately()
    return cli_main(run, argv)


if __name__ == "__main__":
    sys.exit(main())
