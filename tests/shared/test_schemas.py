"""The JSON Schemas of site.toml, spec.toml and server.toml: what ships is as declared, and judges as the reader does.

`make schemas` writes the files.
"""

from __future__ import annotations

import copy
import json
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from fl_client.site.config import SiteFile, template
from fl_server.home.layout import ServerFile
from fl_shared.declaration import Document, json_schema, shipped_schema
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]
FILES: dict[str, tuple[type[Document], Path]] = {
    "site": (SiteFile, ROOT / "client/fl_client/site/site.schema.json"),
    "spec": (RunSpec, ROOT / "shared/fl_shared/documents/spec.schema.json"),
    "server": (ServerFile, ROOT / "server/fl_server/home/server.schema.json"),
}
DIGEST = "sha256:" + "a" * 64
SITE = tomllib.loads(template("hospital-001", "https://coordinator.example:9443"))
SITE["data"] |= {"privacy_unit": "patient", "unit_column": "patient", "max_records_per_unit": 4, "holdout": 0.1}
SITE |= {"supernode": {"launch": True, "confine": "auto"}, "metrics": {"listen": "127.0.0.1:9464"}}
SITE |= {"ledger": {"url": "sqlite:////x"}, "agent": {"stop_grace_s": 15}, "statement": {"partners": ["a"]}}
SPEC: dict[str, Any] = {
    "run": {"name": "demo", "base_model": DIGEST, "sites": ["h-1", "h-2", "h-3"], "rounds": 6, "quorum": 3},
    "aggregation": {},
    "task": {"kind": "classification", "labels": ["a", "b"], "max_tokens": 32},
    "lora": {"rank": 8, "targets": ["attention"]},
    "training": {
        "noise_multiplier": 1.5, "clipping_norm": 1.0, "sampling_probability": 0.1, "steps_per_round": 8,
        "learning_rate": 0.05, "head_learning_rate": 5.0, "momentum": 0.9, "seed_adapter": 0,
    },
}  # fmt: skip
SERVER: dict[str, Any] = {
    "server": {"host": "c.example", "gateway_port": 9443, "control_port": 9444, "database": "", "max_restarts": 20},
    "metrics": {"listen": "127.0.0.1:9445"},
}
GOOD = {"site": SITE, "spec": SPEC, "server": SERVER}


def judged(kind: str, table: Any) -> tuple[bool, bool]:
    """Whether the schema and the reader accept a table."""
    cls, path = FILES[kind]
    valid = Draft202012Validator(json.loads(path.read_text())).is_valid(table)
    try:
        cls.from_dict(table)
    except ConfigError:
        return valid, False
    return valid, True


@pytest.mark.parametrize("kind", sorted(FILES))
def test_what_ships_is_what_the_declarations_say(kind: str) -> None:
    """The file is the generated schema, valid 2020-12, strict in every table, and describes every field."""
    cls, path = FILES[kind]
    assert path.read_text() == shipped_schema(cls), "run `make schemas`"
    schema = json_schema(cls)
    Draft202012Validator.check_schema(schema)
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    for table in tables(schema):
        assert table["additionalProperties"] is False
        assert table["description"]
        for name, field in table["properties"].items():
            assert field.get("description"), name


def tables(schema: Any) -> Iterator[dict[str, Any]]:
    """Every table that a schema declares."""
    if isinstance(schema, dict):
        if "additionalProperties" in schema:
            yield schema
        for each in schema.values():
            yield from tables(each)
    elif isinstance(schema, list):
        for each in schema:
            yield from tables(each)


def examples() -> list[tuple[str, str, dict[str, Any]]]:
    """Every whole example that a person may copy: docs, scenarios, what enrolment and `fl-server init` write."""
    found = [("template", "site", tomllib.loads(template("hospital-001", "https://coordinator.example:9443")))]
    values = {"SITE": "h-1", "SERVER": "https://c.example:9443", "DATA": "d.csv", "BASE_MODEL": DIGEST}
    texts = [(path, path.read_text()) for path in ROOT.glob("scenarios/*/*.toml")]
    for path in [ROOT / "README.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("scenarios/*/README.md")]:
        texts += [(path, block) for block in re.findall(r"```toml\n(.*?)```", path.read_text(), re.DOTALL)]
    for path, text in texts:
        filled = re.sub(r"@(\w+)@", lambda name: values[name.group(1)], text)
        filled = re.sub(r"sha256:[0-9a-f]*(…|\.\.\.)", DIGEST, filled)
        try:
            table = tomllib.loads(filled)
        except tomllib.TOMLDecodeError:
            continue
        for kind, least in (("site", {"site", "data", "policy"}), ("spec", {"run", "task"}), ("server", {"server"})):
            if least <= set(table) and (kind != "server" or "host" in table["server"]):
                found.append((f"{path.relative_to(ROOT)}", kind, table))
    return found


@pytest.mark.parametrize(("where", "kind", "table"), examples(), ids=lambda each: each if isinstance(each, str) else "")
def test_every_example_is_valid(where: str, kind: str, table: dict[str, Any]) -> None:
    """By the schema and by the reader."""
    assert judged(kind, table) == (True, True)


def test_there_are_examples_of_spec_and_site() -> None:
    """The search for them finds what it looks for."""
    assert {kind for _, kind, _ in examples()} >= {"site", "spec"}


WRONG: list[tuple[str, str, str, Any]] = [
    ("site", "site", "id", "Hospital 1"),
    ("site", "server", "url", "http://x:1"),
    ("site", "data", "name", "my data"),
    ("site", "data", "privacy_unit", "row"),
    ("site", "data", "privacy_unit", "record"),
    ("site", "data", "unit_column", None),
    ("site", "data", "text_column", None),
    ("site", "data", "text_columns", ["a"]),
    ("site", "data", "max_records_per_unit", 0),
    ("site", "data", "holdout", 0.95),
    ("site", "data", "public", "no"),
    ("site", "model", "device", "gpu"),
    ("site", "model", "threads", 1.5),
    ("site", "policy", "min_noise_multiplier", 0),
    ("site", "policy", "max_sampling_probability", 1.5),
    ("site", "policy", "targets", ["router"]),
    ("site", "policy", "targets", ["attention", "attention"]),
    ("site", "policy", "apps", ["latest"]),
    ("site", "policy", "max_ranks", 3),
    ("site", "budget", "epsilon", -1),
    ("site", "budget", "epsilon", True),
    ("site", "budget", "delta", 0.5),
    ("site", "budget", "approver", ""),
    ("site", "budget", "valid_from", "soon"),
    ("site", "ledger", "url", "mysql://x"),
    ("site", "supernode", "tunnel_port", 70_000),
    ("site", "supernode", "confine", "maybe"),
    ("site", "metrics", "listen", "0.0.0.0:9464"),
    ("site", "agent", "stop_grace_s", -1),
    ("site", "statement", "approved_on", "soon"),
    ("site", "statement", "partners", []),
    ("spec", "run", "name", "De mo"),
    ("spec", "run", "base_model", "sha256:x"),
    ("spec", "run", "sites", []),
    ("spec", "run", "sites", ["h-1", "../x"]),
    ("spec", "run", "rounds", 0),
    ("spec", "run", "rounds", 100_001),
    ("spec", "run", "quorum", "2"),
    ("spec", "run", "round_timeout_s", 0.5),
    ("spec", "run", "aggregation", "FedAvg"),
    ("spec", "run", "wire", "float16"),
    ("spec", "task", "kind", "regression"),
    ("spec", "task", "labels", ["a"]),
    ("spec", "task", "labels", ["a", "a"]),
    ("spec", "lora", "rank", 1025),
    ("spec", "lora", "alpha", 0),
    ("spec", "lora", "targets", None),
    ("spec", "training", "noise_multiplier", 0),
    ("spec", "training", "clipping_norm", 1e-5),
    ("spec", "training", "momentum", 1),
    ("spec", "training", "learning_rat", 1),
    ("spec", "aggregation", "server_momentum", 0.5),
    ("server", "server", "host", None),
    ("server", "server", "gateway_port", 0),
    ("server", "server", "max_message_bytes", 5),
    ("server", "server", "prot", 5),
    ("server", "metrics", "listen", "9445"),
]


@pytest.mark.parametrize(("kind", "section", "name", "value"), WRONG)
def test_what_is_wrong_is_refused_by_both(kind: str, section: str, name: str, value: Any) -> None:
    """One field wrong, unknown or (None) left out, in a file that both accept."""
    table = copy.deepcopy(GOOD[kind])
    assert judged(kind, table) == (True, True)
    if value is None:
        del table[section][name]
    else:
        table.setdefault(section, {})[name] = value
    assert judged(kind, table) == (False, False)


@pytest.mark.parametrize(
    ("name", "parameters", "valid"),
    [
        ("fedavgm", {"server_momentum": 0.5}, True),
        ("fedavgm", {"beta_1": 0.5}, False),
        ("fedadam", {"beta_1": 0.5, "tau": 1}, True),
        ("fedadam", {"tau": 0}, False),
        ("trimmed-mean", {"cut": 0.4}, True),
        ("trimmed-mean", {"cut": 0.5}, False),
        ("median", {}, True),
        ("median", {"cut": 0.2}, False),
        ("multi-krum", {"malicious": 0}, True),
        ("multi-krum", {"select": 0}, False),
    ],
)
def test_each_aggregator_has_its_own_parameters(name: str, parameters: dict[str, Any], valid: bool) -> None:
    """[aggregation] is judged by what [run] aggregation names."""
    table = copy.deepcopy(SPEC)
    table["run"]["aggregation"] = name
    assert judged("spec", table | {"aggregation": parameters}) == (valid, valid)


@pytest.mark.parametrize(
    ("command", "kind"), [("client", "site"), ("client", "spec"), ("admin", "spec"), ("admin", "server")]
)
def test_the_schema_is_printed(command: str, kind: str, tmp_path: Path) -> None:
    """By both commands, without a home, a profile or a coordinator, and without waiting for pydantic."""
    module = "fl_client.cli.client" if command == "client" else "fl_server.cli.admin"
    code = f"import sys, {module} as m; c = m.main(['schema', '{kind}']); sys.exit(c or 'pydantic' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False, cwd=tmp_path,
        env={"HOME": str(tmp_path), "PATH": "/usr/bin:/bin"},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == json_schema(FILES[kind][0])


if __name__ == "__main__":
    for declared, place in FILES.values():
        place.write_text(shipped_schema(declared))
