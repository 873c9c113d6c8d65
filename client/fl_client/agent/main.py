"""The agent's life: open the site, serve the socket, keep the helpers running, end in good order."""

from __future__ import annotations

import logging
import os
import signal
import threading
from types import FrameType

from cryptography import x509

from fl_client.agent.announcement import Announcer
from fl_client.agent.questions import PlanResponder
from fl_client.agent.service import AgentService, serve
from fl_client.agent.site import OpenSite, open_site
from fl_client.identity import keys
from fl_client.identity.enrolment import Coordinator
from fl_client.identity.gateway import GatewayClient
from fl_client.identity.renewal import Renewer, finish
from fl_client.identity.rotation import PinnedKeys
from fl_client.metrics.site import Metrics
from fl_client.node.confinement import describe_confinement
from fl_client.node.handover import account, handover_mode, make_shared_directories, readable_by
from fl_client.node.helpers import Helpers, listen_loopback
from fl_client.node.sandbox import forbid_inspection
from fl_client.node.spec import NodeSpec, require_own
from fl_client.node.tunnel_settings import TunnelSettings, make_local_certificate
from fl_client.node.walls import require_apart
from fl_client.site.config import SiteConfig, SupernodeConfig
from fl_client.site.home import SiteHome
from fl_client.site.locks import exclusive
from fl_shared.errors import ConfigError
from fl_shared.files import write_durably
from fl_shared.runtime.monitoring import serve_monitoring
from fl_shared.runtime.private_files import close_to_others, open_to_others
from fl_shared.runtime.processes import raise_file_limit
from fl_shared.runtime.stopping import StopRequest

log = logging.getLogger("fl_client.agent")


def run_agent(home: SiteHome, config: SiteConfig) -> int:
    """Run the agent of one site until SIGTERM or Ctrl-C; return the exit status."""
    coordinator = Coordinator.load(home)
    if coordinator.server != config.server:
        raise ConfigError(
            f"{config.source} [server]: url is {config.server!r}, but the site is enrolled at {coordinator.server!r}",
            fix="correct the url, or enrol at the new coordinator with a token and --force",
        )
    forbid_inspection()
    raise_file_limit()
    require_apart([home.root, *config.secrets(home)])
    home.make()
    _close(home, config)
    ending = StopRequest()

    def end(number: int, _frame: FrameType | None) -> None:
        if ending.is_set():
            log.warning("second signal: leaving at once; an open round stays held against the budget")
            os._exit(128 + number)
        ending.set()

    previous = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with exclusive(home.run / "agent.lock", "an agent"):
            keys.finish(home, config.ledger_url, config.site)
            keys.require_known(home, coordinator)
            return _serve(home, config, coordinator, ending)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _close(home: SiteHome, config: SiteConfig) -> None:
    """Take from others what rights they had on files of the home; say what the untrusted user can still read."""
    changed = close_to_others(home.root, home.untrusted)
    if changed:
        log.warning("closed %d files that others than their owner could open, e.g. %s", len(changed), changed[0])
    for path in open_to_others(home.root, home.untrusted):
        log.warning("%s can be opened by others and belongs to another user: chown it to this one", path)
    if config.supernode.user:
        for path in readable_by(account(config.supernode.user), config.secrets(home)):
            log.warning("the untrusted user %s can read %s: chmod go= it", config.supernode.user, path)


def _serve(home: SiteHome, config: SiteConfig, coordinator: Coordinator, ending: StopRequest) -> int:
    if config.policy.allow_non_private:
        log.warning("NON-PRIVATE: allow_non_private waives every bound on noise, for data declared public")
    finish(home)
    separation = describe_confinement(config.supernode.confine, config.supernode.user)  # refuses what is not offered
    helpers = _helpers(home, config, coordinator)
    renewer = Renewer(home, coordinator)
    site: OpenSite | None = None
    metrics, serving = Metrics(), threading.Event()
    loops = [renewer.loop]
    metrics.state.helpers = helpers.states
    metrics.state.certificate_ends = lambda: _certificate_ends(home)

    def missing() -> list[str]:
        lacking = [] if serving.is_set() else ["the agent is starting"]
        lacking += ["the agent is stopping"] if ending.is_set() else []
        if serving.is_set() and not ending.is_set() and not config.supernode.socket.is_socket():
            lacking.append(f"the socket {config.supernode.socket} is gone: restart the agent")
        return (
            lacking
            + helpers.problems()
            + [f"{loop.name} does not go on: {why}" for loop in loops if (why := loop.problem())]
        )

    try:
        if config.metrics is not None:
            loops.append(serve_monitoring(config.metrics, metrics.registry, missing).loop)
        helpers.start_tunnel()
        renewer.start()
        site = open_site(home, config, PinnedKeys(home, coordinator).accepts, metrics.timed)
        if site.ranks is not None:
            site.ranks.start()
        _watch(metrics, site)
        service = AgentService(config.site, site.rounds, metrics, missing)
        server = serve(service, config.supernode.socket, config.supernode.socket_group)
        if config.supernode.user:
            os.chown(config.supernode.socket, account(config.supernode.user).pw_uid, -1, follow_symlinks=False)
        helpers.start_node()
        gateway = GatewayClient.of_site(home, coordinator.server).call
        announcer = Announcer(gateway, site.facts.base)
        responder = PlanResponder(gateway, site.facts, site.outgoing)
        loops += [announcer.loop, responder.loop]
        announcer.loop.start()
        responder.start()
        serving.set()
        position = site.ledger.epsilon(site.dataset)
        log.info(
            "agent of %s is ready; epsilon spent %.3f, left %.3f at delta %g",
            config.site, position.spent, position.left, position.delta,
        )  # fmt: skip
        log.info("untrusted half: %s", separation)
        ending.wait()
        log.info("stopping")
        announcer.loop.stop()
        responder.stop()
        if not site.rounds.drain(config.stop_grace_s):
            log.warning("breaking off the round in progress; it stays held against the budget")
            helpers.stop()  # first, so that nobody reports the round as failed: it resumes after the next start
            site.rounds.break_off()
        server.stop(3).wait(5)
        config.supernode.socket.unlink(missing_ok=True)
    finally:
        renewer.stop()
        helpers.stop()
        if site is not None:
            site.close()
    log.info("stopped")
    return 0


def _watch(metrics: Metrics, site: OpenSite) -> None:
    """Let the metrics ask the open site what they cannot count themselves."""
    metrics.state.position = (site.dataset.name, lambda: site.ledger.epsilon(site.dataset))
    metrics.state.training = lambda: site.rounds.state == "training"


def _certificate_ends(home: SiteHome) -> float | None:
    """When the client certificate that lies there now ends; None while it is being replaced."""
    try:
        return x509.load_pem_x509_certificate(home.client_certificate.read_bytes()).not_valid_after_utc.timestamp()
    except (OSError, ValueError):
        return None


def _helpers(home: SiteHome, config: SiteConfig, coordinator: Coordinator) -> Helpers:
    """Prepare tunnel and SuperNode; a fresh local certificate for each life of the agent."""
    node = config.supernode
    _prepare(home, node)
    local_certificate, local_key = node.directory / "tunnel-ca.pem", home.run / "tunnel.key"
    make_local_certificate(local_certificate, local_key, mode=handover_mode(node.directory))
    listener = listen_loopback(node.tunnel_port)
    spec = NodeSpec(
        directory=node.directory,
        socket=node.socket,
        node_key=node.directory / home.node_key.name,
        tunnel_certificate=local_certificate,
        tunnel_port=listener.getsockname()[1],
        mode=node.confine,
        user=node.user,
    )
    spec.save()
    settings = TunnelSettings(
        listen_fd=listener.fileno(),
        fleet_url=coordinator.server + coordinator.fleet_path,
        ca=str(home.ca),
        certificate=str(home.client_certificate),
        key=str(home.client_key),
        local_certificate=str(local_certificate),
        local_key=str(local_key),
        apps=list(config.policy.apps),
        node_file=str(home.run / "node-id"),
    )
    return Helpers(settings, listener, spec, launch=node.launch)


def _prepare(home: SiteHome, node: SupernodeConfig) -> None:
    """Make what the untrusted half needs outside the home, and bring Flower's node key there."""
    if node.user:
        make_shared_directories(node.directory, node.socket, account(node.user))
    require_own(node.directory)
    if node.directory == home.supernode:
        return
    try:
        write_durably(
            node.directory / home.node_key.name,
            home.node_key.read_bytes(),
            mode=handover_mode(node.directory),
            exact=True,
        )
    except OSError as error:
        raise ConfigError(
            f"[supernode] directory = {str(node.directory)!r}: {error.strerror}",
            fix="create it, owned by the agent's user, readable for the group of both halves (mode 2750)",
        ) from None
