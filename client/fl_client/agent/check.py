"""`fl-client check`: a dry run of everything that a round needs. Nothing is written, nothing is spent."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

from sqlalchemy.engine import make_url

from fl_client.agent.policy import check_policy
from fl_client.agent.site import base_targets, load_base
from fl_client.data.load import load_unit_data, row_report
from fl_client.data.units import UnitData
from fl_client.identity.enrolment import Coordinator
from fl_client.identity.gateway import GatewayClient
from fl_client.identity.keys import require_known
from fl_client.identity.renewal import certificate
from fl_client.identity.rotation import follow
from fl_client.node.confinement import describe_confinement
from fl_client.node.handover import account, readable_by
from fl_client.node.spec import SPEC_FILE
from fl_client.node.walls import require_apart, try_walls
from fl_client.site.config import ANY_APP, SiteConfig
from fl_client.site.home import SiteHome
from fl_shared import __version__
from fl_shared.cli.extras import DISTRIBUTION, missing_package, require
from fl_shared.documents.base_model import BaseModel
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError, ConfigError, EnrolmentError
from fl_shared.identity.fingerprints import grouped_key
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger.records import is_small
from fl_shared.ledger.service import Ledger
from fl_shared.runtime.private_files import open_to_others

if TYPE_CHECKING:
    from fl_client.model.load import LoadedModel

MAX_CLOCK_DIFFERENCE_S = 120.0


@dataclass(frozen=True)
class Result:
    """One line of the report."""

    name: str
    ok: bool
    message: str
    fix: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)


def run_checks(home: SiteHome, site: str, spec: RunSpec | None = None) -> Iterator[Result]:
    """Yield the result of each check as it is done; checks that need an earlier one are left out with it.

    With a `spec`, also whether the site would take part in that run: everything of a round but the private data.
    """
    coordinator: Coordinator | None = None
    config: SiteConfig | None = None
    data: UnitData | None = None
    base: LoadedModel | None = None

    def enrolment() -> str:
        nonlocal coordinator
        coordinator = Coordinator.load(home)
        if coordinator.site != site:
            raise EnrolmentError(f"this home is enrolled as {coordinator.site}", fix=f"use --site {coordinator.site}")
        return f"as {site} at {coordinator.server}"

    def configuration() -> str:
        nonlocal config
        config = SiteConfig.load(home, site)
        return str(home.config)

    yield _checked("packages", _packages)
    yield _checked("enrolled", enrolment)
    yield _checked("keys", lambda: _keys(home))
    yield _checked("config", configuration)
    if config is not None:
        site_config = config

        def table() -> str:
            nonlocal data
            data = load_unit_data(site_config.data, home.fingerprint_key)
            public = "" if site_config.data.expected_units else "; their number is taken as public (see expected_units)"
            return row_report(data, site_config.data) + public

        def model() -> str:
            nonlocal base
            base = load_base(site_config)
            return _model(site_config, base)

        yield _checked("data", table)
        if spec is not None and data is not None:
            yield _checked("labels", lambda: _labels(data, spec))
        yield _checked("model", model)
        if base is not None:
            loaded = base
            yield _checked("device", lambda: _device(loaded))
        yield _checked("policy", lambda: _policy(site_config))
        if spec is not None and base is not None:
            asked, loaded = spec, base
            yield _checked("spec", lambda: _spec(site_config, asked, loaded))
        yield _checked("budget", lambda: _budget(home, site_config, data))
        yield _checked("separation", lambda: _separation(home, site_config))
        yield from _walls(home, site_config)
    if coordinator is not None:
        pinned = coordinator
        yield _checked("server", lambda: _server(home, pinned))


def _checked(name: str, check: Callable[[], str]) -> Result:
    try:
        return Result(name, True, check())
    except ConcordatError as error:
        return Result(name, False, error.message, error.fix)
    except ImportError as error:
        missing = missing_package(error, "fl_client")
        if missing is None:
            raise
        return Result(name, False, missing.message, missing.fix)


def _packages() -> str:
    """What the agent will import is installed, also what only its helpers need."""
    require("client")
    return f"{DISTRIBUTION} {__version__} with all of its extra 'client'"


def _labels(data: UnitData, spec: RunSpec) -> str:
    """The run can use rows; how many is told here alone."""
    from fl_client.tasks.registry import task_of  # torch
    from fl_client.tasks.task import require_usable

    task = task_of(spec)
    require_usable(task, data, "the data set")
    return task.report(data)


def _keys(home: SiteHome) -> str:
    """Every private file exists and is readable by its owner alone."""
    for path in (home.signing_key, home.client_key, home.node_key, home.fingerprint_key):
        mode = _mode(path)
        if mode & 0o077:
            raise ConfigError(f"{path} can be read by others (mode {mode:o})", fix=f"chmod 600 {quote(str(path))}")
    mode = _mode(home.root)
    if mode & 0o077:
        raise ConfigError(f"{home.root} is open to others (mode {mode:o})", fix=f"chmod -R go= {quote(str(home.root))}")
    key = SigningKey.load(home.signing_key)
    detail = f"private; signing key {grouped_key(key.public_hex)}"
    if behind := open_to_others(home.root, home.untrusted):
        detail += f"; behind the closed home {behind[0].name} and {len(behind) - 1} more are not: the agent closes them"
    return detail


def _separation(home: SiteHome, config: SiteConfig) -> str:
    """Nothing private lies where the untrusted half reads; the other user is there and can read no secret."""
    require_apart([home.root, *config.secrets(home)])
    user = config.supernode.user
    if user:
        for path in readable_by(account(user), config.secrets(home)):
            raise ConfigError(f"the untrusted half's user {user} can read {path}", fix=f"chmod go= {quote(str(path))}")
    return describe_confinement(config.supernode.confine, user)


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}",
            fix="restore it from a backup, or enrol again with a new token and --force",
        ) from None


def _model(config: SiteConfig, model: LoadedModel) -> str:
    """The model loads, and there is a GPU for each process that wants one."""
    text = f"{config.model.directory.name}, digest {model.digest}"
    processes = config.model.processes
    if processes == 1:
        return text
    if model.device.type == "cuda":
        import torch

        if processes > torch.cuda.device_count():
            raise ConfigError(
                f"{config.source} [model]: processes is {processes}, and this machine has "
                f"{torch.cuda.device_count()} GPUs",
                fix=f"write processes = {torch.cuda.device_count()}, or less",
            )
        return f"{text}, on {processes} GPUs"
    cores = os.cpu_count() or 1
    if processes * config.model.threads > cores:
        raise ConfigError(
            f"{config.source} [model]: {processes} processes with {config.model.threads} threads each on {cores} CPUs",
            fix="write processes = 1: several processes are for several GPUs",
        )
    return f"{text}, in {processes} processes on the CPU"


def _spec(config: SiteConfig, spec: RunSpec, model: LoadedModel) -> str:
    """The run is for this site, its policy and its base model; the model takes the adapter and can be trained."""
    from fl_client.training.round import prepare_round  # torch

    if config.site not in spec.run.sites:
        raise ConfigError(f"run {spec.run.name} does not name site {config.site}", fix="add it to [run] sites")
    check_policy(spec, config.policy)
    if unfit := BaseModel(model.digest, base_targets(config)).objection(spec):
        raise ConfigError(unfit.message, fix="tell the coordinator's administrator; nothing was spent")
    prepare_round(model, spec, {}, private=not config.policy.allow_non_private)
    return f"run {spec.run.name}: base model, targets and policy suit; {spec.run.rounds} rounds"


def _device(model: LoadedModel) -> str:
    """The device computes one forward and one backward: what a round would find missing is missing here."""
    from fl_client.training.device import try_device  # torch

    return try_device(model)


def _policy(config: SiteConfig) -> str:
    policy = config.policy
    apps = "any app" if policy.apps == (ANY_APP,) else f"{len(policy.apps)} allowed apps"
    text = (
        f"noise at least {policy.min_noise_multiplier:g}, clipping at most {policy.max_clipping_norm:g}, "
        f"sampling at most {policy.max_sampling_probability:g}, "
        f"at most {policy.max_steps_per_round} steps a round, {apps}"
    )
    return f"NON-PRIVATE ALLOWED (public data); {text}" if policy.allow_non_private else text


def _budget(home: SiteHome, config: SiteConfig, data: UnitData | None) -> str:
    """The ledger opens and its head fits; delta suits the data; something is left."""
    budget = config.budget
    if data is not None and not is_small(budget.delta, data.units):
        raise ConfigError(
            f"{config.source} [budget]: delta {budget.delta:g} is not below 1/{data.units}, "
            "one over the number of units",
            fix=f"use a delta below {1 / data.units:.2g}",
        )
    ceiling = f"epsilon {budget.epsilon:g} at delta {budget.delta:g}"
    url = make_url(config.ledger_url)
    if url.drivername == "sqlite" and not Path(url.database or "").exists():
        return f"{ceiling}, nothing spent; the ledger is made at the first start"
    ledger = Ledger.open(config.ledger_url, None, config.site)
    try:
        signs = ledger.public_key()
        if home.next_signing_key.exists() and signs == SigningKey.load(home.next_signing_key).public_hex:
            raise ConfigError("a change of the site's key was broken off", fix="start the agent: it completes it")
        if signs != SigningKey.load(home.signing_key).public_hex:
            raise ConfigError(
                "the ledger is signed by another key than this site's",
                fix="restore keys/signing.pem from its backup",
            )
        if config.data.name not in {dataset.name for dataset in ledger.datasets()}:
            return f"epsilon {budget.epsilon:g} at delta {budget.delta:g}, nothing spent on {config.data.name!r}"
        position = ledger.epsilon(config.data.name)
    finally:
        ledger.close()
    if position.left <= 0:
        raise ConfigError(
            f"the budget of {config.data.name!r} is used up ({position.spent:.3f} of {position.epsilon:g})",
            fix="every round will be refused until the privacy officer approves a larger budget in [budget]",
        )
    return (
        f"epsilon spent {position.spent:.3f}, left {position.left:.3f} of {position.epsilon:g} "
        f"at delta {position.delta:g}"
    )


def _walls(home: SiteHome, config: SiteConfig) -> Iterator[Result]:
    """Each attempt of a confined process to get out, tried for real: refused, or what is open."""
    node = config.supernode
    if node.confine == "off":
        yield Result("walls", True, "not tried: [supernode] confine is off")
        return
    url = make_url(config.ledger_url)
    files = {
        "the data": config.data.path, "the configuration": home.config, "the signing key": home.signing_key,
        "the TLS key": home.client_key, "the fingerprint key": home.fingerprint_key,
        "the launch plan": node.directory / SPEC_FILE, "the agent's log": home.logs / "agent.jsonl",
    }  # fmt: skip
    if url.drivername == "sqlite" and url.database:
        files["the ledger"] = Path(url.database)
    try:
        findings = try_walls({name: path for name, path in files.items() if path.exists()}, node.confine, node.user)
    except ConcordatError as error:
        yield Result("walls", False, error.message, error.fix)
        return
    for name, why in findings.works.items():
        detail = f"the untrusted half cannot use it: {why}" if why else "the untrusted half can use it"
        yield Result(f"door: {name}", not why, detail, "report this, with the line 'separation'" if why else "")
    fix = "give the untrusted half all walls, see the line 'separation', or another user (docs/security.md)"
    for name, result in findings.open.items():
        yield Result(f"wall: {name}", not result, f"OPEN: {result}" if result else "refused", fix if result else "")


def _server(home: SiteHome, pinned: Coordinator) -> str:
    """The coordinator answers, accepts the certificate, and still has the pinned key."""
    require_known(home, pinned)
    hello = GatewayClient.of_site(home, pinned.server).hello()
    if hello.get("site") != pinned.site:
        raise EnrolmentError(f"the coordinator knows this certificate as {hello.get('site')!r}", fix="enrol again")
    followed = follow(pinned, hello.get("rotations", []), time.time())
    if hello.get("coordinator_key") != followed.coordinator_key:
        raise EnrolmentError(
            "the coordinator's signing key is not the one pinned at enrolment, and no rotation vouches for it",
            fix="ask the coordinator's administrator by telephone; then get a new token and enrol with --force",
        )
    clock = hello.get("time")
    if isinstance(clock, int | float) and abs(clock - time.time()) > MAX_CLOCK_DIFFERENCE_S:
        raise ConfigError(
            f"the clocks differ by {abs(clock - time.time()):.0f} s", fix="set this machine's clock (NTP)"
        )
    current = certificate(home)
    detail = f"{pinned.server} accepts the certificate (valid until {current.not_valid_after_utc:%Y-%m-%d})"
    return f"{detail}; its key is {grouped_key(followed.coordinator_key)}"
