"""A site's configuration: one strict TOML file, read into frozen dataclasses.

Every wrong field is refused with the file, the field, its value and what to write instead. A relative
path starts at the file's directory.
"""

from __future__ import annotations

import datetime as dt
import re
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

from fl_client.site.address import server_url
from fl_client.site.home import SiteHome
from fl_shared.audit.report.stated import read_stated
from fl_shared.canonical import check_digest
from fl_shared.documents.spec import LORA_TARGETS
from fl_shared.errors import ConfigError, EnrolmentError, shown
from fl_shared.fields import Fields, load_toml
from fl_shared.files import check_grpc_socket, check_socket, sqlite_url
from fl_shared.names import site_id

ANY_APP = "any"
SHIPPED_MODEL = "tiny"
RECORD = "record"
PRIVACY_UNITS = (RECORD, "patient", "customer")
DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("book", "hooks")
UTF_8 = "utf-8"
MODES = ("auto", "require", "off")
"""[supernode] confine."""
_DATA_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class DataConfig:
    """[data]: where the private table lies and what one privacy unit is.

    `text_columns` with more than one name are written as `name: value; name: value` into one text.
    `holdout` is the share of units that is never trained on, for `fl-client evaluate`.
    `expected_units` is a public round figure for the number of units, which scales the updates; without it
    the exact number counts as public. `encoding` is that of a text table without a byte order mark.
    `shares_units_with` names data sets of the same people: each one's mechanisms count against both budgets, and the
    ledger records it.
    """

    name: str
    path: Path
    text_columns: tuple[str, ...]
    label_column: str
    unit_column: str | None
    privacy_unit: str
    max_records_per_unit: int
    expected_units: int | None
    public: bool
    holdout: float
    shares_units_with: tuple[str, ...] = ()
    encoding: str = UTF_8


@dataclass(frozen=True)
class ModelConfig:
    """[model]: the quantised base model's directory, the device, and how many processes train together on it.

    With more than one process, each holds the model (one per GPU) and has `threads` threads. `engine` "hooks" takes one
    privacy unit at a time, for bases and machines that the start-up check refuses; it costs ten times the time.
    """

    directory: Path
    device: str
    threads: int
    processes: int = 1
    engine: str = ENGINES[0]


@dataclass(frozen=True)
class PolicyConfig:
    """[policy]: what a round may at most ask of this site, and whether it answers plans of runs to come.

    `reply_every_s`: the answer to a computed round leaves a multiple of so many seconds after the order began, or, if
    it is 0, at once. `max_adapter_norm`: how many times as large as the base's own weight a factor of the adapter that
    a coordinator sends may be, in L2 norm.
    """

    min_noise_multiplier: float
    max_clipping_norm: float
    max_sampling_probability: float
    max_steps_per_round: int
    max_rank: int
    targets: tuple[str, ...]
    allow_non_private: bool
    apps: tuple[str, ...]
    answer_plans: bool = True
    reply_every_s: float = 0.0
    max_adapter_norm: float = 10.0


@dataclass(frozen=True)
class BudgetConfig:
    """[budget]: the ceiling, who approved it, and when it is valid (ISO dates, UTC)."""

    epsilon: float
    delta: float
    approver: str
    valid_from: str | None
    valid_to: str | None


@dataclass(frozen=True)
class SupernodeConfig:
    """[supernode]: how the untrusted half is started and kept apart.

    `launch` false: another service (another user) runs it with `fl-client supernode --directory D`. It reaches the
    agent at `socket`, which must not lie in a directory that the other user may write.
    """

    launch: bool
    confine: str
    user: str
    tunnel_port: int
    socket_group: str
    directory: Path
    socket: Path


@dataclass(frozen=True)
class SiteConfig:
    """All of `site.toml`."""

    site: str
    server: str
    data: DataConfig
    model: ModelConfig
    policy: PolicyConfig
    budget: BudgetConfig
    ledger_url: str
    supernode: SupernodeConfig
    metrics: tuple[str, int] | None
    stop_grace_s: float
    source: Path

    def secrets(self, home: SiteHome) -> list[Path]:
        """The files that the untrusted half must never read."""
        from sqlalchemy.engine import make_url  # a GPU machine that only trains has none

        ledger = make_url(self.ledger_url) if self.ledger_url.startswith("sqlite:") else None
        keys = [home.signing_key, home.client_key, home.fingerprint_key]
        places = [home.config, *keys, self.data.path, *([Path(ledger.database)] if ledger and ledger.database else [])]
        return [path for path in places if path.exists()]

    @classmethod
    def load(cls, home: SiteHome, site: str) -> SiteConfig:
        """Read `site.toml` of `home`; ConfigError names the first wrong field and its fix."""
        path = home.config
        if not path.exists():
            raise ConfigError(
                f"{path} does not exist",
                fix=f"run `fl-client enroll --site {site} ...`, which writes a template, or copy one there",
            )
        top = Fields(load_toml(path), str(path), base=path.parent)
        made = cls(
            site=_site(top.section("site"), site),
            server=_server(top.section("server")),
            data=_data(top.section("data")),
            model=_model(top.section("model", optional=True)),
            policy=_policy(top.section("policy")),
            budget=_budget(top.section("budget")),
            ledger_url=_ledger(top.section("ledger", optional=True), home),
            supernode=_supernode(top.section("supernode", optional=True), home),
            metrics=_metrics(top.section("metrics", optional=True)),
            stop_grace_s=_grace(top.section("agent", optional=True)),
            source=path,
        )
        read_stated(top.section("statement", optional=True))  # fl-audit statement repeats it; here it is only checked
        top.done()
        if made.model.processes > 1:
            check_socket(home.ranks / "r12345678" / "s", fix="choose a home with a shorter path, or processes = 1")
        if made.policy.allow_non_private and not made.data.public:
            raise ConfigError(
                f"{path} [policy]: allow_non_private is true, but [data] public is false",
                fix="set allow_non_private = false; only public data may be trained on without noise",
            )
        return made


def _site(fields: Fields, expected: str) -> str:
    found = fields.named("id", site_id)
    fields.done()
    if found != expected:
        raise fields.fail(
            "id", f"is {found!r}, but this is the home of {expected!r}", "give the right --site or --home"
        )
    return found


def _server(fields: Fields) -> str:
    text = fields.text("url")
    fields.done()
    try:
        return server_url(text)
    except EnrolmentError as error:
        raise fields.fail("url", f"is {text!r}: {error.message}", error.fix) from None


def _data(fields: Fields) -> DataConfig:
    name = fields.text("name")
    if not _DATA_NAME.fullmatch(name):
        raise fields.fail("name", f"is {name!r}", "use 1 to 63 letters, digits, dots, hyphens and underscores")
    several = fields.has("text_columns")
    columns = fields.texts("text_columns", high=200) if several else (fields.text("text_column"),)
    unit = fields.choice("privacy_unit", PRIVACY_UNITS)
    made = DataConfig(
        name=name,
        path=fields.path("path"),
        text_columns=columns,
        label_column=fields.text("label_column"),
        unit_column=fields.text("unit_column", default=None),
        privacy_unit=unit,
        max_records_per_unit=fields.integer("max_records_per_unit", low=1, high=10_000, default=1),
        expected_units=(fields.integer("expected_units", low=1, high=10**12) if fields.has("expected_units") else None),
        public=fields.boolean("public", default=False),
        holdout=fields.number("holdout", low=0, high=0.9, default=0.0),
        shares_units_with=fields.texts("shares_units_with", low=0, high=100, default=()),
        encoding=fields.text("encoding", default=UTF_8),
    )
    fields.done()
    try:
        b"".decode(made.encoding)
    except (LookupError, UnicodeError, ValueError):
        raise fields.fail(
            "encoding", f"is {shown(made.encoding)}", 'write "utf-8", "cp1252" or another of Python\'s text encodings'
        ) from None
    if unit != RECORD and made.unit_column is None:
        raise fields.fail(
            "unit_column",
            f"is missing, but privacy_unit is {unit!r}",
            f"name the column that identifies the {unit}",
        )
    if unit == RECORD and made.unit_column is not None:
        raise fields.fail(
            "unit_column",
            f"is {made.unit_column!r}, but privacy_unit is 'record'",
            'set privacy_unit = "patient", or remove unit_column',
        )
    if unit == RECORD and made.max_records_per_unit != 1:
        raise fields.fail(
            "max_records_per_unit",
            f"is {made.max_records_per_unit}",
            "a record is one record: remove the field",
        )
    return made


def _model(fields: Fields) -> ModelConfig:
    directory = fields.path("directory", default=SHIPPED_MODEL)
    if directory.name == SHIPPED_MODEL and not directory.is_dir():
        directory = Path(str(resources.files("fl_client"))) / "model" / SHIPPED_MODEL
    made = ModelConfig(
        directory=directory,
        device=fields.choice("device", DEVICES, default="auto"),
        threads=fields.integer("threads", low=1, high=1024, default=1),
        processes=fields.integer("processes", low=1, high=64, default=1),
        engine=fields.choice("engine", ENGINES, default=ENGINES[0]),
    )
    fields.done()
    return made


def _policy(fields: Fields) -> PolicyConfig:
    apps = fields.texts("apps", high=100, default=(ANY_APP,))
    for app in apps:
        if app == ANY_APP and len(apps) == 1:
            continue
        try:
            check_digest(app)
        except ConfigError as error:
            raise fields.fail("apps", f"names {app!r}", f'write ["any"], or digests: {error.fix}') from None
    targets = fields.texts("targets", high=len(LORA_TARGETS), default=LORA_TARGETS)
    for target in targets:
        if target not in LORA_TARGETS:
            raise fields.fail("targets", f"names {target!r}", f"choose from {', '.join(LORA_TARGETS)}")
    made = PolicyConfig(
        min_noise_multiplier=fields.number("min_noise_multiplier", low=0, high=1e6, above=True),
        max_clipping_norm=fields.number("max_clipping_norm", low=0, high=1e6, above=True),
        max_sampling_probability=fields.number("max_sampling_probability", low=0, high=1, above=True),
        max_steps_per_round=fields.integer("max_steps_per_round", low=1, high=1_000_000),
        max_rank=fields.integer("max_rank", low=1, high=1024, default=64),
        targets=targets,
        allow_non_private=fields.boolean("allow_non_private", default=False),
        apps=apps,
        answer_plans=fields.boolean("answer_plans", default=True),
        reply_every_s=fields.number("reply_every_s", low=0, high=7 * 86_400, default=1.0),
        max_adapter_norm=fields.number("max_adapter_norm", low=0, high=1e6, above=True, default=10.0),
    )
    fields.done()
    return made


def _budget(fields: Fields) -> BudgetConfig:
    made = BudgetConfig(
        epsilon=fields.number("epsilon", low=0, high=1e6, above=True),
        delta=fields.number("delta", low=0, high=0.01, above=True),
        approver=fields.text("approver"),
        valid_from=_date(fields, "valid_from"),
        valid_to=_date(fields, "valid_to"),
    )
    fields.done()
    if made.valid_from and made.valid_to and made.valid_from >= made.valid_to:
        raise fields.fail("valid_to", f"is {made.valid_to}, not after valid_from", "give a later date")
    return made


def _date(fields: Fields, name: str) -> str | None:
    """An ISO date or time as text; a bare date means midnight UTC."""
    if not fields.has(name):
        fields.text(name, default="")
        return None
    text = fields.text(name)
    try:
        moment = dt.datetime.fromisoformat(text)
    except ValueError:
        raise fields.fail(name, f"is {text!r}", 'write a date in quotes, e.g. "2027-01-31"') from None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=dt.UTC)
    return moment.astimezone(dt.UTC).isoformat(timespec="seconds")


def _ledger(fields: Fields, home: SiteHome) -> str:
    url = fields.text("url", default=sqlite_url(home.ledger))
    fields.done()
    if not re.match(r"(sqlite|postgresql(\+psycopg)?)://", url):
        raise fields.fail("url", f"is {url!r}", "write sqlite:////path/ledger.sqlite or postgresql://user@host/db")
    return url


def _supernode(fields: Fields, home: SiteHome) -> SupernodeConfig:
    other = fields.text("user", default="", empty=True)
    made = SupernodeConfig(
        launch=fields.boolean("launch", default=True),
        confine=fields.choice("confine", MODES, default="auto"),
        user=other,
        tunnel_port=fields.integer("tunnel_port", low=0, high=65535, default=0),
        socket_group=fields.text("socket_group", default="", empty=True),
        directory=fields.path("directory", default=home.meeting / "supernode" if other else home.supernode),
        socket=fields.path("socket", default=home.meeting / "agent.sock" if other else home.socket),
    )
    fields.done()
    short = home.root.name.replace(",", "")[:30]
    check_grpc_socket(made.socket, fix=f'write [supernode] socket = "/run/concordat/{short}.sock" or the like')
    if made.user or made.socket_group:
        for name, path in (("socket", made.socket), *([("directory", made.directory)] if made.user else [])):
            if path.is_relative_to(home.root):
                raise fields.fail(
                    name,
                    f"is {str(path)!r}, in the site's home, which no other user can enter",
                    "leave it out, or name a place outside the home" if made.user else "name one in /run/concordat",
                )
    if not made.launch and made.tunnel_port == 0:
        raise fields.fail("tunnel_port", "is 0, but launch is false", "choose a fixed port for the other service")
    return made


def _grace(fields: Fields) -> float:
    """[agent] stop_grace_s: how long a round in progress may go on after SIGTERM or Ctrl-C."""
    grace = fields.number("stop_grace_s", low=0, high=86_400, default=15.0)
    fields.done()
    return grace


def _metrics(fields: Fields) -> tuple[str, int] | None:
    """The address of the metrics, a loopback one: they are for the site's own operators."""
    text = fields.text("listen", default="", empty=True)
    fields.done()
    if not text:
        return None
    match = re.fullmatch(r"(127\.0\.0\.1|localhost):(\d{1,5})", text)
    if match is None or not 0 < int(match.group(2)) < 65536:
        raise fields.fail("listen", f"is {text!r}", 'write a loopback address, e.g. "127.0.0.1:9464"')
    return match.group(1), int(match.group(2))


def template(site: str, server: str) -> str:
    """Return a commented `site.toml` for a newly enrolled site."""
    return f"""\
# Configuration of site {site}. Check it with: fl-client check --site {site}

[site]
id = "{site}"

[server]
url = "{server}"

[data]
name = "records"                 # the data set's name in the ledger; budgets belong to it
path = "data.csv"                # .csv .tsv .jsonl .json .parquet; relative to this file
text_column = "text"             # or text_columns = ["age", "purpose"] to join several
label_column = "label"
privacy_unit = "record"          # "patient" or "customer": all rows of one of them are protected together
# unit_column = "patient_id"     # needed unless the unit is a record
# max_records_per_unit = 5       # further rows of one patient are not used
# expected_units = 3000          # a public round figure for their number; without it the exact number is public
# encoding = "cp1252"            # of a text file that is not UTF-8 (a byte order mark wins)
# holdout = 0.2                  # share of units kept out of training, for `fl-client evaluate`
# shares_units_with = ["other"]  # data sets with the same people in them: what one spends, the other has spent, too
public = false                   # true only for data that anyone may read

[model]
directory = "tiny"               # a directory made by `fl-model quantize`, or the shipped "tiny"
device = "auto"                  # auto | cpu | cuda
threads = 1
# processes = 2                  # train on so many GPUs of this machine together

[policy]                         # the last word on what a round may ask of this site
min_noise_multiplier = 0.8
max_clipping_norm = 1.0
max_sampling_probability = 0.2
max_steps_per_round = 20
# targets = ["attention", "shared_experts", "routed_experts"]
# apps = ["sha256:..."]          # allow-list of the apps that the coordinator may ship; default ["any"]
# answer_plans = true            # tell `fl-admin runs plan` how many rounds the budget holds, and what is refused
# max_adapter_norm = 10          # factors of an adapter that is sent, as multiples of the base's own weights
# reply_every_s = 1              # answers leave at multiples of this: how long a round took is private
# allow_non_private = false      # training without noise; only with [data] public = true

[budget]                         # the ceiling for this data set, for all runs together
epsilon = 8.0
delta = 1e-5                     # must be below 1 / number of units
approver = "name of the privacy officer"
# valid_from = "2027-01-01"
# valid_to = "2027-12-31"

# [statement]                    # what `fl-audit statement` repeats on your word; the ledger does not know it
# institution = "name of the hospital"
# purpose = "what the model is trained for"
# partners = ["University Hospital North", "City Clinics"]
# approved_on = "2027-01-14"     # of the budget, by its approver
# contact = "dpo@example.org"

# [ledger]
# url = "sqlite:////path/ledger.sqlite"        # or postgresql://user@host/database

# [supernode]                    # the untrusted half
# confine = "auto"               # auto | require | off: namespaces, Landlock and seccomp (docs/security.md)
# user = "concordat-node"        # run it as another user (the agent must be root)

# [agent]
# stop_grace_s = 15              # after SIGTERM a round may go on for so long; then it waits for the next start

# [metrics]
# listen = "127.0.0.1:9464"      # Prometheus, for the site's own operators
"""
