"""site.toml: every field wrong in turn is named with the fix, exit code 2, no traceback."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from fl_client.cli.client import main
from fl_client.site.config import SiteConfig, template
from fl_client.site.home import SiteHome
from fl_shared.errors import ConfigError
from helpers.specs import site_toml

SITE = "hospital-001"
GOOD = site_toml(
    data={
        "label_column": "chapter",
        "unit_column": "patient",
        "privacy_unit": "patient",
        "max_records_per_unit": 4,
        "expected_units": 1000,
        "holdout": 0.1,
        "public": False,
    },
    model={"threads": 1},
    policy={"max_rank": 16, "targets": ["attention"], "allow_non_private": False, "apps": ["any"]},
    budget={"valid_from": "2026-01-01", "valid_to": "2027-01-01"},
    ledger={"url": "sqlite:////tmp/ledger.sqlite"},
    supernode={
        "launch": True,
        "confine": "auto",
        "user": "",
        "tunnel_port": 0,
        "socket_group": "",
        "directory": "supernode",
    },
    metrics={"listen": "127.0.0.1:9464"},
    agent={"stop_grace_s": 15.0},
)

# The line that replaces the field of the same name in the section, and the words that must be in the message.
WRONG = [
    ("site", 'id = "Hospital 1"', "id is 'Hospital 1'"),
    ("site", 'id = "hospital-002"', "'hospital-002'"),
    ("server", 'url = "http://x:1"', "url is 'http://x:1'"),
    ("data", 'name = "my data"', "name is 'my data'"),
    ("data", "path = 3", "path is 3"),
    ("data", 'text_column = ["a"]', "text_column is ['a']"),
    ("data", 'label_column = ""', "label_column is ''"),
    ("data", "unit_column = 1", "unit_column is 1"),
    ("data", 'privacy_unit = "row"', "privacy_unit is 'row'"),
    ("data", 'privacy_unit = "record"', "unit_column is 'patient', but privacy_unit is 'record'"),
    ("data", "max_records_per_unit = 0", "max_records_per_unit is 0"),
    ("data", "expected_units = 0", "expected_units is 0"),
    ("data", "holdout = 1.0", "holdout is 1.0"),
    ("data", 'public = "no"', "public is 'no'"),
    ("model", "directory = 1", "directory is 1"),
    ("model", 'device = "gpu"', "device is 'gpu'"),
    ("model", "threads = 0", "threads is 0"),
    ("model", 'engine = "ghost"', "engine is 'ghost'"),
    ("policy", "min_noise_multiplier = 0", "min_noise_multiplier is 0"),
    ("policy", "min_noise_multiplier = nan", "min_noise_multiplier is nan"),
    ("policy", "max_clipping_norm = -1", "max_clipping_norm is -1"),
    ("policy", "max_clipping_norm = inf", "max_clipping_norm is inf"),
    ("policy", "max_sampling_probability = 1.5", "max_sampling_probability is 1.5"),
    ("policy", "max_steps_per_round = 2.5", "max_steps_per_round is 2.5"),
    ("policy", "max_rank = 0", "max_rank is 0"),
    ("policy", 'targets = ["router"]', "targets names 'router'"),
    ("policy", "allow_non_private = true", "[data] public is false"),
    ("policy", 'apps = ["latest"]', "apps names 'latest'"),
    ("budget", "epsilon = -1", "epsilon is -1"),
    ("budget", "epsilon = true", "epsilon is True"),
    ("budget", "delta = 0.5", "delta is 0.5"),
    ("budget", "delta = 0", "delta is 0"),
    ("budget", 'approver = ""', "approver is ''"),
    ("budget", 'valid_from = "soon"', "valid_from is 'soon'"),
    ("budget", 'valid_to = "2025-01-01"', "valid_to is"),
    ("ledger", 'url = "mysql://x"', "url is 'mysql://x'"),
    ("supernode", "launch = 1", "launch is 1"),
    ("supernode", "launch = false", "tunnel_port is 0, but launch is false"),
    ("supernode", 'confine = "maybe"', "confine is 'maybe'"),
    ("supernode", "user = 7", "user is 7"),
    ("supernode", "directory = 1", "directory is 1"),
    ("supernode", "tunnel_port = 70000", "tunnel_port is 70000"),
    ("supernode", "socket_group = []", "socket_group is []"),
    ("metrics", 'listen = "0.0.0.0:9464"', "listen is '0.0.0.0:9464'"),
    ("metrics", 'listen = "127.0.0.1:0"', "listen is '127.0.0.1:0'"),
    ("agent", "stop_grace_s = -1", "stop_grace_s is -1"),
    ("agent", 'stop_grace_s = "long"', "stop_grace_s is 'long'"),
    ("policy", "min_noise_multipler = 1", "min_noise_multipl"),
]


def changed(section: str, line: str) -> str:
    """The good file with the field of `line` in `section` replaced (or added)."""
    name = line.split(" = ")[0]
    out, here, done = [], "", False
    for old in GOOD.splitlines():
        if old.startswith("["):
            if here == section and not done:
                out.append(line)
                done = True
            here = old.strip("[]")
        if here == section and old.startswith(f"{name} = "):
            out.append(line)
            done = True
        else:
            out.append(old)
    return "\n".join(out)


@pytest.fixture
def home(tmp_path: Path) -> SiteHome:
    """A home with the good configuration."""
    (tmp_path / "site.toml").write_text(GOOD)
    return SiteHome(tmp_path)


def test_the_good_file_is_read_into_its_fields(home: SiteHome) -> None:
    """Relative paths start at the file; dates become UTC; the shipped model is found by name."""
    config = SiteConfig.load(home, SITE)
    assert config.data.path == home.root / "records.csv"
    assert config.data.text_columns == ("text",)
    assert config.budget.valid_from == "2026-01-01T00:00:00+00:00"
    assert config.model.directory.parts[-2:] == ("model", "tiny")
    assert config.ledger_url == "sqlite:////tmp/ledger.sqlite"


@pytest.mark.parametrize(("section", "line", "message"), WRONG)
def test_each_wrong_field_is_named_with_value_and_fix(
    home: SiteHome, section: str, line: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """`fl-client check`'s own reader: file, field and value in the message, a fix, exit code 2."""
    home.config.write_text(changed(section, line))
    assert main(["run", "--site", SITE, "--home", str(home.root)]) == 2
    shown = capsys.readouterr().err
    assert message in shown
    assert "site.toml" in shown
    assert f"[{section}]" in shown
    assert "fix: " in shown
    assert "Traceback" not in shown


REQUIRED = ["id", "url", "name", "path", "text_column", "label_column", "privacy_unit"]
REQUIRED += ["min_noise_multiplier", "max_clipping_norm", "max_sampling_probability", "max_steps_per_round"]
REQUIRED += ["epsilon", "delta", "approver"]


@pytest.mark.parametrize("field", REQUIRED)
def test_each_missing_required_field_is_named(home: SiteHome, field: str) -> None:
    """Leaving a field out says which one, and what to write."""
    lines, left_out = [], False
    for line in GOOD.splitlines():
        if line.startswith(f"{field} = ") and not left_out:
            left_out = True
        else:
            lines.append(line)
    home.config.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=f"{field} is missing") as failure:
        SiteConfig.load(home, SITE)
    assert failure.value.fix


@pytest.mark.parametrize("section", ["site", "server", "data", "policy", "budget"])
def test_each_missing_section_is_named(home: SiteHome, section: str) -> None:
    """A whole missing table is an error that names it."""
    kept, here = [], ""
    for line in GOOD.splitlines():
        here = line.strip("[]") if line.startswith("[") else here
        if here != section:
            kept.append(line)
    home.config.write_text("\n".join(kept))
    with pytest.raises(ConfigError, match=f"{section} is missing"):
        SiteConfig.load(home, SITE)


@pytest.mark.parametrize("text", ["[site\n", "a = ", "\x00", "[other]\nx = 1\n"])
def test_a_file_that_is_no_such_toml_is_refused(home: SiteHome, text: str) -> None:
    """Broken syntax and foreign sections are configuration errors."""
    home.config.write_text(text)
    with pytest.raises(ConfigError, match=r"site\.toml"):
        SiteConfig.load(home, SITE)


def test_a_misspelt_field_gets_its_nearest_name(home: SiteHome) -> None:
    """An unknown field is refused, not ignored."""
    home.config.write_text(GOOD.replace("allow_non_private", "allow_nonprivate"))
    with pytest.raises(ConfigError) as failure:
        SiteConfig.load(home, SITE)
    assert "allow_non_private" in failure.value.fix


def test_the_template_is_a_valid_configuration(tmp_path: Path) -> None:
    """What enrolment writes can be read as it stands."""
    home = SiteHome(tmp_path)
    home.config.write_text(template(SITE, "https://h:9443"))
    config = SiteConfig.load(home, SITE)
    assert (config.site, config.server, config.policy.apps) == (SITE, "https://h:9443", ("any",))


def test_no_site_and_no_configuration_are_explained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a site, and with a home that has no site.toml, the fix is named."""
    monkeypatch.delenv("FL_SITE", raising=False)
    assert main([]) == 2
    assert "--site" in capsys.readouterr().err
    assert main(["--site", SITE, "--home", str(tmp_path)]) == 2
    assert "fl-client enroll" in capsys.readouterr().err


def test_the_help_of_every_verb_has_examples_or_options() -> None:
    """`fl-client --help` ends with examples; each verb answers --help with code 0."""
    top = subprocess.run([sys.executable, "-m", "fl_client.cli.client", "--help"], capture_output=True, text=True)
    assert top.returncode == 0
    assert "examples:" in top.stdout
    for verb in ("run", "enroll", "check", "status", "train-alone", "supernode"):
        with pytest.raises(SystemExit) as end:
            main([verb, "--help"])
        assert end.value.code == 0
