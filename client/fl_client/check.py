"""`fl-client check`: a dry run of everything that a round needs. Nothing is written, nothing is spent."""

from __future__ import annotations

import os
import stat
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from shlex import quote
from typing import Any

from sqlalchemy.engine import make_url

from fl_client.agent.site import load_base
from fl_client.config import ANY_APP, SiteConfig
from fl_client.data.load import load_unit_data
from fl_client.data.units import UnitData
from fl_client.enrolment import Coordinator
from fl_client.hello import say_hello
from fl_client.home import SiteHome
from fl_client.renewal import certificate
from fl_client.rotation import follow
from fl_client.supernode import describe_confinement
from fl_shared import __version__
from fl_shared.errors import ConcordatError, ConfigError, EnrolmentError
from fl_shared.extras import DISTRIBUTION, missing_package, require
from fl_shared.fingerprints import spoken_key
from fl_shared.ledger.service import Ledger
from fl_shared.signing import SigningKey

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


def run_checks(home: SiteHome, site: str) -> Iterator[Result]:
    """Yield the result of each check as it is done; checks that need an earlier one are left out with it."""
    coordinator: Coordinator | None = None
    config: SiteConfig | None = None
    data: UnitData | None = None

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
        found = config

        def table() -> str:
            nonlocal data
            data = load_unit_data(found.data, home.fingerprint_key)
            unit = found.data.privacy_unit
            text = f"{found.data.path.name}: {len(data.texts)} rows, {data.units} units (each a {unit})"
            public = "" if found.data.expected_units else "; their number counts as public (see expected_units)"
            return text + public

        yield _checked("data", table)
        yield _checked("model", lambda: _model(found))
        yield _checked("policy", lambda: _policy(found))
        yield _checked("budget", lambda: _budget(home, found, data))
        yield _checked("separation", lambda: describe_confinement(found.supernode.confine, found.supernode.user))
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


def _keys(home: SiteHome) -> str:
    """Every private file exists and is readable by its owner alone."""
    for path in (home.signing_key, home.client_key, home.node_key, home.fingerprint_key):
        mode = _mode(path)
        if mode & 0o077:
            raise ConfigError(f"{path} can be read by others (mode {mode:o})", fix=f"chmod 600 {quote(str(path))}")
    mode = _mode(home.root)
    if mode & 0o066:
        raise ConfigError(f"{home.root} is open to others (mode {mode:o})", fix=f"chmod 700 {quote(str(home.root))}")
    key = SigningKey.load(home.signing_key)
    return f"private; signing key {spoken_key(key.public_hex)}"


def _mode(path: Path) -> int:
    try:
        return stat.S_IMODE(path.stat().st_mode)
    except OSError as error:
        raise ConfigError(
            f"{path}: {error.strerror}",
            fix="restore it from a backup, or enrol again with a new token and --force",
        ) from None


def _model(config: SiteConfig) -> str:
    """The model loads, and there is a GPU for each process that wants one."""
    model = load_base(config)
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
    if data is not None and budget.delta * data.units >= 1.0:
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
        key = SigningKey.load(home.signing_key)
        if ledger.public_key() != key.public_hex:
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


def _server(home: SiteHome, pinned: Coordinator) -> str:
    """The coordinator answers, accepts the certificate, and still has the pinned key."""
    hello = say_hello(home, pinned)
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
    found = certificate(home)
    told = f"{pinned.server} accepts the certificate (valid until {found.not_valid_after_utc:%Y-%m-%d})"
    return f"{told}; its key is {spoken_key(followed.coordinator_key)}"
