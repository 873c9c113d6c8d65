"""`fl-audit canaries`: found through its entry point, honest on the right engine, loud about a broken one."""

from __future__ import annotations

import importlib.util
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
from client_sites import spec_table

from fl_client.dp import noise
from fl_shared.audit import cli
from fl_shared.audit.report import page

SMALL = ("--count", "40", "--guesses", "20")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `fl-audit canaries`."""
    code = cli.main(["canaries", *arguments])
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_right_engine_is_not_accused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Both kinds of canaries and both tests on the shipped model; the file can be attached to a statement."""
    out = tmp_path / "canaries.json"
    code, text, _ = run(capsys, *SMALL, "--json", "--out", str(out))
    found = json.loads(text)
    assert code == 0
    assert found == json.loads(out.read_text())
    assert not found["accused"]
    assert found["epsilon_lower"] < found["claimed_epsilon"] == pytest.approx(1.271, abs=1e-3)
    assert [audit["kind"] for audit in found["audits"]] == ["records", "gradients"]
    assert all(audit["confidence"] == pytest.approx(0.975) for audit in found["audits"])
    assert [test["name"] for test in found["distributions"]] == ["noise", "sampler"]
    section = page._empirical({"empirical_audit": {"file_sha256": "0" * 64, "result": found}})
    heads = [block.head for block in section.blocks if isinstance(block, page.Table)]
    assert ("fault", "records", "gradients") in heads
    assert sum("accused" in head for head in heads) == 2


def test_a_runs_spec_sets_the_mechanism(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """All rounds' steps are audited, with the spec's LoRA; the text says for each fault whether the power suffices."""
    table = spec_table(steps_per_round=2)
    spec = tmp_path / "run.toml"
    spec.write_text(
        "".join(
            f"[{section}]\n" + "".join(f"{name} = {json.dumps(value)}\n" for name, value in fields.items())
            for section, fields in table.items()
        )
    )
    code, text, _ = run(capsys, "--spec", str(spec), "--canaries", "gradients", *SMALL)
    assert code == 0
    assert "noise 1, q 0.1, 6 steps, clipping 1" in text
    assert "shuffled batches" in text
    assert "no: tested below" in text
    assert "nothing accuses the engine" in text


def test_a_broken_engine_is_accused(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without noise the exit code is the engine's, and the verdict is plain."""
    monkeypatch.setattr(noise._Draws, "next", lambda self, count: np.zeros(count, dtype=np.int64))
    code, text, _ = run(capsys, "--canaries", "gradients", "--count", "400", "--guesses", "200")
    assert code == 19
    assert "the engine is ACCUSED" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--noise-multiplier", "-1"), "noise_multiplier"),
        (("--confidence", "1.5"), "--confidence"),
        (("--spec", "/nowhere.toml"), "nowhere.toml"),
        (("--model", "/nowhere"), "nowhere"),
        (("--count", "10000000", "--canaries", "gradients"), "gradient canaries"),
        (("--site", "hospital-001", "--home", "/nowhere"), "does not exist"),
    ],
)
def test_wrong_arguments_are_explained(
    capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str
) -> None:
    """Each names the value and a fix, without a traceback."""
    code, _, errors = run(capsys, *arguments)
    assert code in (2, 14, 19)
    assert message in errors
    assert "fix: " in errors
    assert "Traceback" not in errors


def test_without_the_client_the_verb_says_what_to_install(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the packages there but not torch, and with the package itself gone."""
    with monkeypatch.context() as patched:
        find = importlib.util.find_spec
        patched.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "torch" else find(name, *rest))
        code, _, errors = run(capsys)
    assert code == 2
    assert "torch is not installed" in errors
    assert "concordat[client]" in errors
    entry = metadata.EntryPoint("canaries", "no_such_package.canaries", cli.MORE_VERBS)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == cli.MORE_VERBS else [])
    code, _, errors = run(capsys)
    assert code == 2
    assert "no_such_package" in errors
    assert "concordat[client]" in errors
