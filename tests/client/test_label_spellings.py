"""What the operator of a site is told about labels before anything is charged, by the commands that a person runs."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from fl_shared.adapters.safetensors import pack
from helpers.agents import MARKER, RealSite, spec
from helpers.gateway import Gateway
from helpers.smallest import smallest_base, smallest_digest
from helpers.specs import to_toml


def write_spec(path: Path, labels: list[str]) -> Path:
    """A spec for the shipped base, as TOML with a byte order mark."""
    table = spec(smallest_digest(), rounds=1).to_dict()
    table["task"]["labels"] = labels
    path.write_text(to_toml(table), encoding="utf-8-sig")
    return path


@pytest.fixture
def site(tmp_path: Path, gateway: Gateway) -> RealSite:
    """An enrolled site whose table a spreadsheet program wrote: semicolons, cp1252, and rows that cannot be used."""
    made = RealSite(tmp_path / "home", gateway)
    lines = [f"Grüße {MARKER} {n};{('Lungs', 'HEART')[n % 2]};{MARKER}-{n // 2}" for n in range(120)]
    lines += [f";Lungs;{MARKER}-3", ";;", f"x;;{MARKER}-4", f"third;Lungs;{MARKER}-5"]
    (made.home.root / "records.csv").write_text("text;label;patient\n" + "\n".join(lines), encoding="cp1252")
    text = made.home.config.read_text().replace("[data]", '[data]\nencoding = "cp1252"\nholdout = 0.2')
    made.home.config.write_text(text, encoding="utf-8-sig")
    return made


def test_check_tells_rows_and_labels_and_nothing_is_charged(site: RealSite, tmp_path: Path) -> None:
    """Every unused row with its reason, spellings, absent labels; a spec that fits nothing fails the check."""
    done = site.run(
        "fl-client", "check", "--json", "--spec", write_spec(tmp_path / "spec.toml", ["lungs", "heart", "brain"])
    )
    lines = {line["name"]: line for line in json.loads(done.stdout)["checks"]}
    assert lines["data"]["message"].startswith(
        "records.csv: 120 rows used of 124, 60 units (each a patient); left out: 2 without text, 1 without label, "
        "1 beyond 2 of one unit"
    )
    assert lines["labels"]["ok"]
    assert lines["labels"]["message"] == (
        "120 of 120 used rows have one of the spec's 3 labels; 120 of them in another spelling; no row has 'brain'"
    )
    wrong = site.run("fl-client", "check", "--json", "--spec", write_spec(tmp_path / "wrong.toml", ["1", "2"]))
    assert wrong.returncode == 2
    (labels,) = [line for line in json.loads(wrong.stdout)["checks"] if line["name"] == "labels"]
    assert not labels["ok"]
    assert labels["fix"]
    assert MARKER not in done.stdout + done.stderr + wrong.stdout + wrong.stderr
    assert not site.home.ledger.exists()


def test_commands_of_the_operator_refuse_labels_that_nobody_has_before_they_charge(
    site: RealSite, tmp_path: Path
) -> None:
    """train-alone and evaluate: exit code 15, and no reservation is in the ledger."""
    made = write_spec(tmp_path / "spec.toml", ["1", "2"])
    alone = site.run("fl-client", "train-alone", "--spec", made, "--out", tmp_path / "alone")
    hidden = json.loads((smallest_base() / "config.json").read_text())["hidden_size"]
    (tmp_path / "adapter").write_bytes(pack({"classifier.weight": np.zeros((2, hidden), np.float32)}))
    judged = site.run("fl-client", "evaluate", "--spec", made, "--adapter", tmp_path / "adapter", "--force")
    for done, what in ((alone, "the training data"), (judged, "the hold-out")):
        assert done.returncode == 15, done.stderr
        assert f"no record of {what} has one of the spec's labels: '1', '2'" in done.stderr
        assert "120 rows used of 124, 60 units" in done.stdout  # told whatever comes then, and before any charge
        assert "used rows have one of the spec's 2 labels" in done.stdout
    for content, word in ((b"", "holds no tensor"), (pack({}, {"a": "b"}), "holds no tensor"), (b"{", "header")):
        (tmp_path / "none").write_bytes(content)  # a copy that failed costs nothing
        done = site.run("fl-client", "evaluate", "--spec", made, "--adapter", tmp_path / "none", "--force")
        assert done.returncode == 15, done.stderr
        assert word in done.stderr
    assert site.spends() == []
    assert not (tmp_path / "alone").exists()
