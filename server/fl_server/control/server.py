"""The control API as a process: gRPC with mutual TLS 1.3, every call behind the check (`fl_server.control.calls`)."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import grpc

from fl_server.access.check import Access
from fl_server.control.calls import CheckedCalls
from fl_server.control.service import Control
from fl_server.db.store import Store
from fl_server.home.layout import ServerHome
from fl_shared.errors import ConfigError
from fl_shared.runtime.logs import set_up
from fl_shared.runtime.stopping import StopRequest
from fl_shared.runtime.threads import running_pool
from fl_shared.wire.control_pb2_grpc import add_ControlServicer_to_server
from fl_shared.wire.hosts import host_and_port

MAX_REQUEST_BYTES = 4 << 20
WORKERS = 32


def serve(home: ServerHome) -> grpc.Server:
    """Start the server; the caller stops it.

    Raises:
        ConfigError: the port cannot be used.
    """
    settings, store = home.settings(), Store(home.database_url())
    server = grpc.server(
        running_pool(WORKERS, "control"),
        interceptors=[CheckedCalls(Access.of(home, store))],
        options=[("grpc.max_receive_message_length", MAX_REQUEST_BYTES), ("grpc.so_reuseport", 0)],
        maximum_concurrent_rpcs=4 * WORKERS,
    )
    add_ControlServicer_to_server(Control(home, store), server)
    credentials = grpc.ssl_server_credentials(
        [(home.server_key.read_bytes(), home.server_certificate.read_bytes())],
        root_certificates=home.ca.read_bytes(),
        require_client_auth=True,
    )
    address = host_and_port(settings.control_host, settings.control_port)
    try:
        server.add_secure_port(address, credentials)
    except RuntimeError as error:
        raise ConfigError(
            f"[server] control_port: {address} cannot be used", fix="free the port or choose another"
        ) from error
    server.start()
    return server


def main() -> int:
    """`python -m fl_server.control --home H`."""
    parser = argparse.ArgumentParser(prog="fl_server.control")
    parser.add_argument("--home", required=True, type=Path)
    home = ServerHome.open(parser.parse_args().home)
    set_up("control")
    over = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    server = serve(home)
    over.wait()
    server.stop(3.0).wait()
    return 0
