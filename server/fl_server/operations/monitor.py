"""The component that serves the coordinator's metrics, health and readiness on `[metrics] listen`.

A process of its own, so that a slow scrape never holds up the supervisor or a round.
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_server.operations.metrics import coordinator_registry
from fl_server.operations.supervisor import read_state
from fl_shared.cli.entry import cli_main
from fl_shared.errors import ConfigError
from fl_shared.runtime.logs import set_up
from fl_shared.runtime.monitoring import serve_monitoring
from fl_shared.runtime.stopping import StopRequest


def missing(home: ServerHome, store: Store) -> list[str]:
    """What keeps the coordinator from carrying runs; DatabaseAway when the database does not answer."""
    with store.read() as session:
        session.connection()
    return [
        f"the {component['name']} is {component['state']}" + (f": {component['why']}" if component.get("why") else "")
        for component in read_state(home)["components"]
        if component["state"] != "ready" and component["name"] != "monitor"
    ]


def run(argv: Sequence[str] | None) -> int:
    """Serve until SIGTERM; 0 at the end."""
    parser = argparse.ArgumentParser(prog="fl_server.operations.monitor")
    parser.add_argument("--home", required=True, type=Path)
    home = ServerHome.open(parser.parse_args(argv).home)
    set_up("monitor")
    address = home.settings().metrics
    if address is None:
        raise ConfigError("server.toml has no [metrics]", fix='write [metrics] with listen = "127.0.0.1:9445"')
    over = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    store = Store(home.database_url())
    registry = coordinator_registry(store, lambda: read_state(home)["components"], home.counters)
    server = serve_monitoring(address, registry, lambda: missing(home, store))
    over.wait()
    server.shutdown()
    store.close()
    return 0


if __name__ == "__main__":
    sys.exit(cli_main(run, package="fl_server"))
