"""`fl-client evaluate`: evaluate an adapter on the private hold-out, with noise and an entry in the ledger."""

from __future__ import annotations

import argparse

from fl_client.cli.client.options import add_common, home_of, log_to_file
from fl_client.site.config import SiteConfig
from fl_shared.cli.extras import require
from fl_shared.cli.output import print_json, working
from fl_shared.cli.verbs import path

EXAMPLES = """
fl-client evaluate --site hospital-001 --spec spec.toml --adapter demo.safetensors
fl-client evaluate --site hospital-001 --spec spec.toml --adapter demo.safetensors --noise 20 --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--spec", type=path, required=True, help="the spec that the adapter was trained with")
    parser.add_argument("--adapter", type=path, required=True, help="from `fl-admin adapters export` or train-alone")
    parser.add_argument("--noise", type=float, default=10.0, help="noise multiplier, default 10; less costs more")
    parser.add_argument(
        "--force", action="store_true", help="be charged even where the noise is likely to hide the figures"
    )


def run(arguments: argparse.Namespace) -> int:
    """Evaluate, and print the figures."""
    home = home_of(arguments)
    require("client")  # before a reservation that would be charged for it
    from fl_client.agent.evaluation import are_usable, evaluate_privately
    from fl_client.agent.site import open_site
    from fl_client.site.locks import exclusive
    from fl_client.tasks.registry import task_of
    from fl_shared.adapters.safetensors import read_adapter
    from fl_shared.documents.spec import RunSpec

    config = SiteConfig.load(home, arguments.site)
    spec = RunSpec.from_toml(arguments.spec)
    task = task_of(spec)
    adapter = read_adapter(arguments.adapter)
    home.make()
    log_to_file(home, arguments)
    with (
        exclusive(home.run / "agent.lock", "evaluate"),
        working("opening ledger, data and model", quiet=arguments.quiet, json=arguments.json) as say,
    ):
        site = open_site(home, config, lambda _: False)
        try:
            if not arguments.json:
                holdout_report = f"; {task.report(site.holdout)}" if site.holdout is not None else ""
                print(f"{site.rows}{holdout_report}", flush=True)
            say("evaluating on the hold-out")
            document = evaluate_privately(site, spec, adapter, arguments.noise, force=arguments.force)
        finally:
            site.close()
    figures = document["body"]["figures"]
    if arguments.json:
        print_json(document)
    elif not are_usable(figures):
        print("too few units for this noise: no accuracy can be told; it stays charged")
    else:
        print(f"{task.summary(figures)}; ledger entry {document['body']['entry_id']}")
    return 0
