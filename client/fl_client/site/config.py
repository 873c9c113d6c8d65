"""A site's configuration: one strict TOML file (site.toml), declared table by table.

Every wrong field is refused with the file, the field, its value and what to write instead. A relative
path starts at the file's directory.
"""

from __future__ import annotations

import dataclasses
import datetime as dt
import re
from dataclasses import dataclass, field
from importlib import resources
from pathlib import Path
from typing import Annotated, ClassVar, Self

from fl_client.site.address import server_url
from fl_client.site.home import SiteHome
from fl_shared.audit.report.stated import Statement
from fl_shared.canonical import DIGEST, check_digest
from fl_shared.declaration import Document
from fl_shared.documents.spec import LORA_TARGETS
from fl_shared.errors import ConfigError, shown
from fl_shared.fields import (
    Between,
    Choice,
    FieldError,
    MaybeEmpty,
    Named,
    PathField,
    SiteName,
    Text,
    TextRule,
    Texts,
    Whole,
)
from fl_shared.files import check_grpc_socket, check_socket, sqlite_url
from fl_shared.toml import load_toml

ANY_APP = "any"
SHIPPED_MODEL = "tiny"
RECORD = "record"
PRIVACY_UNITS = (RECORD, "patient", "customer")
DEVICES = ("auto", "cpu", "cuda")
ENGINES = ("book", "hooks")
UTF_8 = "utf-8"
MODES = ("auto", "require", "off")
"""[supernode] confine."""
_DATA_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}"
_DATA_NAME_FIX = "use 1 to 63 letters, digits, dots, hyphens and underscores"
_LEDGER_FIX = "write sqlite:////path/ledger.sqlite or postgresql://user@host/db"


@dataclass(frozen=True)
class SiteSection(Document):
    """[site]: whose configuration this is."""

    id: SiteName
    """The site's name, as it was enrolled."""


def _server_url(value: object) -> str:
    if not isinstance(value, str):
        raise ConfigError("", fix="write a text in quotes")
    return server_url(value)


@dataclass(frozen=True)
class ServerSection(Document):
    """[server]: the coordinator."""

    url: Annotated[str, Named(_server_url, "^[Hh][Tt][Tt][Pp][Ss]://", "an address in quotes")]
    """The coordinator's gateway, https://HOST:PORT."""


@dataclass(frozen=True)
class DataConfig(Document):
    """[data]: where the private table lies and what one privacy unit is."""

    STATED: ClassVar = ("label_column", "privacy_unit")
    SCHEMA: ClassVar = {
        "oneOf": [{"required": ["text_column"]}, {"required": ["text_columns"]}],
        "if": {"properties": {"privacy_unit": {"const": RECORD}}},
        "then": {"properties": {"unit_column": False, "max_records_per_unit": {"const": 1}}},
        "else": {"required": ["unit_column"]},
    }

    name: Annotated[str, TextRule(pattern=_DATA_NAME, fix=_DATA_NAME_FIX)]
    """The data set's name in the ledger; budgets belong to it."""
    path: PathField
    """The table: .csv .tsv .jsonl .json .parquet."""
    text_columns: Annotated[tuple[str, ...], Texts(1, 200)] = ()
    """Columns that are written as `name: value; name: value` into one text."""
    label_column: Text = ""
    """The column with the label."""
    unit_column: Text | None = None
    """The column that identifies the privacy unit; needed unless that is a record."""
    privacy_unit: Annotated[str, Choice(PRIVACY_UNITS)] = RECORD
    """Whose records are protected together."""
    max_records_per_unit: Annotated[int, Whole(1, 10_000)] = 1
    """Further records of one unit are not used."""
    expected_units: Annotated[int, Whole(1, 10**12)] | None = None
    """A public round figure for their number, which scales the updates; without it the exact number is public."""
    public: bool = False
    """Whether anyone may read the data."""
    holdout: Annotated[float, Between(0, 0.9)] = 0.0
    """The share of units that is never trained on, for `fl-client evaluate`."""
    shares_units_with: Annotated[tuple[str, ...], Texts(0, 100)] = ()
    """Data sets of the same people: each one's mechanisms are charged to both budgets, and the ledger records it."""
    encoding: Text = UTF_8
    """The encoding of a text table without a byte order mark."""
    text_column: Text | None = field(default=None, kw_only=True)
    """The column with the text, where it is one."""

    def checked(self) -> Self:
        """The text's column is named one way, the encoding exists, and unit and column fit each other."""
        if self.text_column is not None and self.text_columns:
            raise FieldError("text_column", "is given beside text_columns", "write one of the two")
        if self.text_column is None and not self.text_columns:
            raise FieldError("text_column", "is missing", "add text_column: a text in quotes")
        try:
            b"".decode(self.encoding)
        except (LookupError, UnicodeError, ValueError):
            fix = 'write "utf-8", "cp1252" or another of Python\'s text encodings'
            raise FieldError("encoding", f"is {shown(self.encoding)}", fix) from None
        unit, column, most = self.privacy_unit, self.unit_column, self.max_records_per_unit
        if unit != RECORD and column is None:
            fix = f"name the column that identifies the {unit}"
            raise FieldError("unit_column", f"is missing, but privacy_unit is {unit!r}", fix)
        if unit == RECORD and column is not None:
            fix = 'set privacy_unit = "patient", or remove unit_column'
            raise FieldError("unit_column", f"is {column!r}, but privacy_unit is 'record'", fix)
        if unit == RECORD and most != 1:
            raise FieldError("max_records_per_unit", f"is {most}", "a record is one record: remove the field")
        if self.text_column is None:
            return self
        return dataclasses.replace(self, text_columns=(self.text_column,), text_column=None)


@dataclass(frozen=True)
class ModelConfig(Document):
    """[model]: the quantised base model, the device, and how many processes train together on it.

    With more than one process, each holds the model (one per GPU) and has `threads` threads.
    """

    directory: PathField = Path(SHIPPED_MODEL)
    """A directory that `fl-model quantize` made, or the shipped "tiny"."""
    device: Annotated[str, Choice(DEVICES)] = "auto"
    """Where the model is trained."""
    threads: Annotated[int, Whole(1, 1024)] = 1
    """Threads of each process."""
    processes: Annotated[int, Whole(1, 64)] = 1
    """How many GPUs of this machine train together."""
    engine: Annotated[str, Choice(ENGINES)] = ENGINES[0]
    """hooks: one unit at a time, for bases and machines that the start-up check refuses, in ten times the time."""


@dataclass(frozen=True)
class PolicyConfig(Document):
    """[policy]: what a round may at most ask of this site, and whether it answers plans of runs to come."""

    min_noise_multiplier: Annotated[float, Between(0, 1e6, above=True)]
    """The least noise, over the clipping norm."""
    max_clipping_norm: Annotated[float, Between(0, 1e6, above=True)]
    """The largest bound on what one unit contributes."""
    max_sampling_probability: Annotated[float, Between(0, 1, above=True)]
    """The largest chance of a unit to be in a step."""
    max_steps_per_round: Annotated[int, Whole(1, 1_000_000)]
    """The most steps of one round."""
    max_rank: Annotated[int, Whole(1, 1024)] = 64
    """The largest rank of an adapter."""
    targets: Annotated[tuple[str, ...], Texts(1, len(LORA_TARGETS), options=LORA_TARGETS)] = LORA_TARGETS
    """The groups of layers that may be adapted."""
    allow_non_private: bool = False
    """Training without noise; only with [data] public = true."""
    apps: Annotated[tuple[str, ...], Texts(1, 100, pattern=f"^({ANY_APP}|{DIGEST})$")] = (ANY_APP,)
    """The apps that the coordinator may ship, by digest, or ["any"]."""
    answer_plans: bool = True
    """Whether `fl-admin runs plan` is told how many rounds the budget holds, and what is refused."""
    reply_every_s: Annotated[float, Between(0, 7 * 86_400)] = 1.0
    """The answer to a round leaves a multiple of so many seconds after the order began; at once, if it is 0."""
    max_adapter_norm: Annotated[float, Between(0, 1e6, above=True)] = 10.0
    """How many times as large as the base's own weight a factor of a sent adapter may be, in L2 norm."""

    def checked(self) -> Self:
        """The apps are any, or digests."""
        for app in () if self.apps == (ANY_APP,) else self.apps:
            try:
                check_digest(app)
            except ConfigError as error:
                fix = f'write ["any"], or digests: {error.fix}'
                raise FieldError("apps", f"names {shown(app)}", fix) from None
        return self


def _date(value: object) -> str:
    """An ISO date or time in UTC; a bare date means midnight UTC."""
    try:
        moment = dt.datetime.fromisoformat(value if isinstance(value, str) else "")
        if moment.tzinfo is None:
            moment = moment.replace(tzinfo=dt.UTC)
        return moment.astimezone(dt.UTC).isoformat(timespec="seconds")
    except (ValueError, OverflowError):
        raise ConfigError("", fix='write a date in quotes, e.g. "2027-01-31"') from None


Date = Annotated[str, Named(_date, r"^\d{4}-?(\d{2}|W\d{2})")]


@dataclass(frozen=True)
class BudgetConfig(Document):
    """[budget]: the ceiling for the data set, for all runs together."""

    epsilon: Annotated[float, Between(0, 1e6, above=True)]
    """The ceiling of epsilon."""
    delta: Annotated[float, Between(0, 0.01, above=True)]
    """The delta that epsilon is stated at; below 1 / number of units."""
    approver: Text
    """Who approved the budget."""
    valid_from: Date | None = None
    """The first moment of the budget: a date (midnight UTC) or a time."""
    valid_to: Date | None = None
    """The moment at which the budget ends."""

    def checked(self) -> Self:
        """The budget ends after it begins."""
        if self.valid_from and self.valid_to and self.valid_from >= self.valid_to:
            raise FieldError("valid_to", f"is {self.valid_to}, not after valid_from", "give a later date")
        return self


@dataclass(frozen=True)
class LedgerSection(Document):
    """[ledger]: where the privacy ledger lies; in the home, when left out."""

    url: Annotated[str, TextRule(pattern=r"(sqlite|postgresql(\+psycopg)?)://.*", fix=_LEDGER_FIX)] = ""
    """sqlite:////path/ledger.sqlite or postgresql://user@host/database."""


@dataclass(frozen=True)
class SupernodeConfig(Document):
    """[supernode]: how the untrusted half is started and kept apart.

    `launch` false: another service (another user) runs it with `fl-client supernode --directory D`. It reaches the
    agent at `socket`, which must not lie in a directory that the other user may write.
    """

    launch: bool = True
    """Whether the agent starts it."""
    confine: Annotated[str, Choice(MODES)] = MODES[0]
    """Namespaces, Landlock and seccomp: where the machine has them, required, or off."""
    user: MaybeEmpty = ""
    """Run it as another user; the agent must be root."""
    tunnel_port: Annotated[int, Whole(0, 65535)] = 0
    """The port of the tunnel on loopback; 0: any free one."""
    socket_group: MaybeEmpty = ""
    """The group that may reach the agent's socket."""
    directory: PathField = field(default_factory=Path)
    """Its working directory."""
    socket: PathField = field(default_factory=Path)
    """The agent's socket."""

    def checked(self) -> Self:
        """Another service finds the tunnel at a fixed port."""
        if not self.launch and self.tunnel_port == 0:
            fix = "choose a fixed port for the other service"
            raise FieldError("tunnel_port", "is 0, but launch is false", fix)
        return self

    def placed(self, home: SiteHome) -> SupernodeConfig:
        """Directory and socket where they were left out; ConfigError when the other user could not reach them."""
        directory = home.meeting / "supernode" if self.user else home.supernode
        socket = home.meeting / "agent.sock" if self.user else home.socket
        placed = dataclasses.replace(
            self,
            directory=directory if self.directory == Path() else self.directory,
            socket=socket if self.socket == Path() else self.socket,
        )
        short = home.root.name.replace(",", "")[:30]
        check_grpc_socket(placed.socket, fix=f'write [supernode] socket = "/run/concordat/{short}.sock" or the like')
        if placed.user or placed.socket_group:
            for name, path in (("socket", placed.socket), *([("directory", placed.directory)] if placed.user else [])):
                if path.is_relative_to(home.root):
                    place = f"{home.config} [supernode]: {name} is {str(path)!r}"
                    raise ConfigError(
                        f"{place}, in the site's home, which no other user can enter",
                        fix="leave it out, or name a place outside the home"
                        if placed.user
                        else "name one in /run/concordat",
                    )
        return placed


@dataclass(frozen=True)
class AgentSection(Document):
    """[agent]: how the agent stops."""

    stop_grace_s: Annotated[float, Between(0, 86_400)] = 15.0
    """How many seconds a round in progress may go on after SIGTERM or Ctrl-C."""


def _loopback(value: object) -> tuple[str, int] | None:
    match = re.fullmatch(r"(127\.0\.0\.1|localhost):(\d{1,5})", value) if isinstance(value, str) else None
    if value == "":
        return None
    if match is None or not 0 < int(match.group(2)) < 65536:
        raise ConfigError("", fix='write a loopback address, e.g. "127.0.0.1:9464"')
    return match.group(1), int(match.group(2))


@dataclass(frozen=True)
class MetricsSection(Document):
    """[metrics]: Prometheus metrics, for the site's own operators."""

    listen: Annotated[tuple[str, int] | None, Named(_loopback, r"^((127\.0\.0\.1|localhost):\d{1,5})?$")] = None
    """A loopback address and a port, for example 127.0.0.1:9464."""


@dataclass(frozen=True)
class SiteFile(Document):
    """A site's configuration (site.toml)."""

    SECTIONS: ClassVar = True

    site: SiteSection
    server: ServerSection
    data: DataConfig
    policy: PolicyConfig
    budget: BudgetConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    ledger: LedgerSection = field(default_factory=LedgerSection)
    supernode: SupernodeConfig = field(default_factory=SupernodeConfig)
    metrics: MetricsSection = field(default_factory=MetricsSection)
    agent: AgentSection = field(default_factory=AgentSection)
    statement: Statement = field(default_factory=Statement)

    def checked(self) -> Self:
        """Only public data is trained on without noise."""
        if self.policy.allow_non_private and not self.data.public:
            raise FieldError(
                "",
                "[policy]: allow_non_private is true, but [data] public is false",
                "set allow_non_private = false; only public data may be trained on without noise",
            )
        return self


@dataclass(frozen=True)
class SiteConfig:
    """All of `site.toml`, with what was left out filled in from the site's home."""

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
        file = SiteFile.from_dict(load_toml(path), where=str(path), base=path.parent)
        if file.site.id != site:
            raise ConfigError(
                f"{path} [site]: id is {file.site.id!r}, but this is the home of {site!r}",
                fix="give the right --site or --home",
            )
        if file.model.processes > 1:
            check_socket(home.ranks / "r12345678" / "s", fix="choose a home with a shorter path, or processes = 1")
        directory = path.parent / file.model.directory
        if directory.name == SHIPPED_MODEL and not directory.is_dir():
            directory = Path(str(resources.files("fl_client"))) / "model" / SHIPPED_MODEL
        return cls(
            site=site,
            server=file.server.url,
            data=file.data,
            model=dataclasses.replace(file.model, directory=directory),
            policy=file.policy,
            budget=file.budget,
            ledger_url=file.ledger.url or sqlite_url(home.ledger),
            supernode=file.supernode.placed(home),
            metrics=file.metrics.listen,
            stop_grace_s=file.agent.stop_grace_s,
            source=path,
        )


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
