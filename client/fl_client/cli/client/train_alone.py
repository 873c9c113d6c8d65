"""`fl-client train-alone`: train a run's spec at this site alone, charged like a federated run."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import signal

from fl_client.cli.client.options import add_common, home_of, log_to_file
from fl_client.site.config import SiteConfig
from fl_shared.cli.extras import require
from fl_shared.cli.output import print_json, working
from fl_shared.cli.verbs import path

EXAMPLES = """
fl-client train-alone --site hospital-001 --spec spec.toml --out alone/
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_common(parser)
    parser.add_argument("--spec", type=path, required=True, help="the run's spec, as for `fl-admin runs launch`")
    parser.add_argument("--out", type=path, required=True, help="directory for adapter.safetensors and receipts.json")


def run(arguments: argparse.Namespace) -> int:
    """Train, and print what it cost."""
    home = home_of(arguments)
    require("client")  # before a reservation that would be charged for it
    from fl_client.agent.alone import train_alone
    from fl_client.agent.site import open_site
    from fl_client.site.locks import exclusive
    from fl_client.tasks.registry import task_of
    from fl_shared.documents.spec import RunSpec
    from fl_shared.identity.signing import SigningKey
    from fl_shared.names import ALONE

    config = SiteConfig.load(home, arguments.site)
    spec = RunSpec.from_toml(arguments.spec)
    home.make()
    log_to_file(home, arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    # Nobody outside sees when a round of the site's own ends.
    config = dataclasses.replace(config, policy=dataclasses.replace(config.policy, reply_every_s=0.0))
    order_key = SigningKey.generate()
    with contextlib.ExitStack() as progress, exclusive(home.run / "agent.lock", "train-alone"):

        def show(stage: str) -> None:
            progress.enter_context(working(stage, quiet=arguments.quiet, json=arguments.json))

        def say(text: str) -> None:
            progress.close()  # one thing at a time on a terminal
            if not arguments.json:
                print(text, flush=True)
            show("training the next round")

        show("opening ledger, data and model")
        site = open_site(home, config, lambda key: key == order_key.public_hex, namespace=ALONE)
        try:
            say(f"{site.rows}; {task_of(spec).report(site.data)}")
            done = train_alone(site, spec, order_key, arguments.out, say)
        finally:
            site.close()
    if arguments.json:
        print_json(done)
    else:
        print(f"adapter {done['adapter']}; epsilon spent {done['epsilon_spent_total']:.3f} at delta {done['delta']:g}")
    return 0
