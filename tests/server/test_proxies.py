"""Proxies of the environment stand before no call to this machine: a proxy that nobody may reach sees nothing."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator

import pytest

from fl_server.db.store import Store
from fl_server.identity.sites import Sites
from helpers.coordinators import Coordinator, coordinator, until

VARIABLES = ("http_proxy", "https_proxy", "all_proxy", "grpc_proxy", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY")

pytestmark = pytest.mark.timeout(300)


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[bytes]]:
    """A proxy that answers nothing and keeps what it was asked; every variable that names one names it."""
    asked: list[bytes] = []
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                arrived, _ = listening.accept()
            except OSError:
                return
            with arrived:
                arrived.settimeout(5)
                asked.append(arrived.recv(4096))

    threading.Thread(target=serve, daemon=True).start()
    for name in VARIABLES:
        monkeypatch.setenv(name, f"http://127.0.0.1:{listening.getsockname()[1]}")
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield asked
    listening.shutdown(socket.SHUT_RDWR)
    listening.close()


def test_a_round_runs_on_a_machine_whose_environment_names_a_proxy(
    proxy: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Coordinator, SuperLink, ServerApp, `flwr`, `fl-admin` and a site's own enrolment: none asks the proxy."""
    original = Coordinator.start_node

    def without(self: Coordinator, site: str, *rest: object) -> object:
        # The helper's SuperNode inherits the test's environment; a real site's is built from nothing.
        with monkeypatch.context() as own:
            for name in VARIABLES:
                own.delenv(name)
            return original(self, site, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(Coordinator, "start_node", without)
    with coordinator("h-1") as one:
        one.launch(name="proxied", sites=["h-1"], rounds=1, quorum=1)
        assert one.wait("proxied", "completed", "failed")["state"] == "completed"
        token = Sites(Store(f"sqlite:///{one.home / 'coordinator.sqlite'}")).invite(
            "h-2", ca_sha256=one.facts["ca_sha256"]
        )
        home = str(one.root / "h2")
        one.run("fl-client", "enroll", "--site", "h-2", "--home", home, "--server", one.url, "--token", token.token)
        row = next(each for each in one.admin("sites", "list")["sites"] if each["site"] == "h-2")
        assert row["state"] == "enrolled"
        assert row["online"] is False
        until(lambda: one.admin("status")["components"][0]["state"] == "ready", "all is well")
    assert proxy == []
