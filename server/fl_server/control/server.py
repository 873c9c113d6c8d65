"""The control API as a process: gRPC with mutual TLS 1.3, every call behind the check (`fl_server.control.calls`)."""

from __future__ import annotations

import argparse
import os
import signal
import sys
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

# gRPC has no switch for TLS 1.3 alone. This list is for TLS 1.2 alone, and nothing in it fits our EC certificate.
TLS_1_2_CIPHERS = "ECDHE-RSA-AES256-GCM-SHA384"
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
    """`python -m fl_server.control.server --home H`, as the supervisor starts it."""
    parser = argparse.ArgumentParser(prog="fl_server.control.server")
    parser.add_argument("--home", required=True, type=Path)
    if os.environ.get("GRPC_SSL_CIPHER_SUITES") != TLS_1_2_CIPHERS:
        os.environ["GRPC_SSL_CIPHER_SUITES"] = TLS_1_2_CIPHERS  # read when gRPC is imported, so start again
        os.execv(sys.executable, [sys.executable, "-m", "fl_server.control.server", *sys.argv[1:]])  # noqa: S606
    home = ServerHome.open(parser.parse_args().home)
    set_up("control")
    over = StopRequest()
    signal.signal(signal.SIGTERM, lambda *_: over.set())
    server = serve(home)
    over.wait()
    server.stop(3.0).wait()
    return 0


if __name__ == "__main__":
    sys.exit(main())
