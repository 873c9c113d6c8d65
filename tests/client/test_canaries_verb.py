"""`fl-audit canaries`: found through its entry point, honest on the right engine, loud about a broken one."""

from __future__ import annotations

import importlib.util
import itertools
import json
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest

from fl_client.dp import engine
from fl_client.dp.audit import canaries
from fl_client.dp.engine import DPEngine
from fl_client.dp.mechanism import noise
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_shared.audit import cli
from fl_shared.audit.report import page
from helpers.specs import write_spec

SMALL = ("--count", "40", "--guesses", "20")


@pytest.fixture(autouse=True)
def _known_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Coins, sampling and noise under known keys: an audit at 97.5 % may accuse a right engine now and then."""
    keys = itertools.count(1)
    for module in (engine, canaries):
        monkeypatch.setattr(module, "SecureStream", lambda: SecureStream(next(keys).to_bytes(32, "big")))


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
    spec = tmp_path / "run.toml"
    write_spec(spec, steps_per_round=2)
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
    ("code", "arguments", "message"),
    [
        (2, ("--noise-multiplier", "-1"), "noise_multiplier"),
        (2, ("--noise-multiplier", "nan"), "noise_multiplier"),
        (2, ("--noise-multiplier", "1e-9"), "noise_multiplier is 1e-09"),
        (2, ("--noise-multiplier", "1e-3"), "which no audit can contradict"),
        (2, ("--steps", "0"), "an audit of 0 steps"),
        (2, ("--steps", "-3"), "an audit of -3 steps"),
        (2, ("--steps", "100000000"), "an audit of 100000000 steps"),
        (2, ("--steps", "90000"), "which no audit can contradict"),
        (2, ("--sampling-probability", "0"), "sampling_probability"),
        (2, ("--noise-multiplier", "1e6"), "too coarse for the noise grid"),
        (2, ("--sampling-probability", "1.5"), "sampling_probability"),
        (2, ("--sampling-probability", "nan"), "sampling_probability"),
        (2, ("--confidence", "1.5"), "--confidence 1.5 does not lie between 0.5 and 0.999999"),
        (2, ("--confidence", "0.9999999999999999"), "--confidence 0.9999999999999999"),
        (2, ("--confidence", "nan"), "--confidence nan"),
        (2, ("--delta", "nan"), "--delta nan"),
        (2, ("--delta", "0"), "--delta 0.0 does not lie between 1e-12 and 0.1"),
        (2, ("--delta", "1e-300"), "--delta 1e-300"),
        (2, ("--delta", "0.9"), "--delta 0.9"),
        (2, ("--spec", "/nowhere.toml"), "nowhere.toml"),
        (14, ("--model", "/nowhere"), "nowhere"),
        (2, ("--count", "10000000", "--canaries", "gradients"), "gradient canaries, because"),
        (2, ("--count", "1000000", "--canaries", "records"), "record canaries, because"),
        (2, ("--count", "200", "--guesses", "300"), "--guesses 300 for 200 record canaries"),
        (2, ("--site", "hospital-001", "--home", "/nowhere"), "does not exist"),
        (2, ("--out", "/nowhere/canaries.json"), "--out /nowhere/canaries.json"),
        (2, ("--out", "/"), "--out /"),
        (2, ("--out", f"{__file__}/canaries.json"), "cannot be written"),
    ],
)
def test_wrong_arguments_are_explained(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    code: int,
    arguments: tuple[str, ...],
    message: str,
) -> None:
    """Each names the value and a fix, without a traceback, before anything is trained, and accuses nobody."""
    monkeypatch.setattr(DPEngine, "__init__", lambda *_, **__: pytest.fail("the engine was made"))
    found, _, errors = run(capsys, *arguments)
    assert found == code
    assert message in errors
    assert "fix: " in errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("count", ["3", "0", "-2", "x", "1e3"])
def test_odd_numbers_of_canaries_are_refused_by_name(capsys: pytest.CaptureFixture[str], count: str) -> None:
    """Half of the guesses say in, half out."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["canaries", f"--count={count}"])
    assert caught.value.code == 2
    assert f"'{count}' is not a positive even number" in capsys.readouterr().err


def test_a_number_of_thousands_of_digits_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    """Python does not even read it; no function's name comes out."""
    with pytest.raises(SystemExit) as caught:
        cli.main(["canaries", f"--count={'8' * 5000}"])
    assert caught.value.code == 2
    errors = capsys.readouterr().err
    assert "(5002 characters) is not a positive even number" in errors
    assert "_even" not in errors


def test_a_huge_clipping_norm_accuses_nobody(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """The noise of the first step leaves the parameters alone, so the second has no loss of NaN."""
    spec = tmp_path / "run.toml"
    write_spec(spec, clipping_norm=1e12, noise_multiplier=5.0, sampling_probability=1.0, steps_per_round=4)
    code, text, errors = run(capsys, "--spec", str(spec), "--canaries", "records", "--quiet", *SMALL)
    assert (code, errors.strip()) == (0, "")  # 20 guesses prove no more than this mechanism claims
    assert "clipping 1e+12" in text


def test_coins_that_leave_everybody_out_accuse_nobody(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With two canaries that happens every fourth time: then the engine trains on nobody."""
    monkeypatch.setattr(canaries, "SecureStream", lambda: Tails(bytes(32)))
    code, text, _ = run(capsys, "--count", "2", "--guesses", "2")
    assert code == 0
    assert "nothing accuses the engine" in text


class Tails(SecureStream):
    """A coin that says out, always."""

    def words(self, count: int) -> np.ndarray:
        """Even words."""
        return np.zeros(count, dtype=np.uint64)


def test_a_result_that_cannot_be_written_is_shown_all_the_same(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The disk filled up meanwhile: what the audit found stands on the screen, and an accusation keeps its code."""

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    code, text, errors = run(capsys, *SMALL, "--canaries", "gradients", "--json", "--out", str(tmp_path / "a.json"))
    assert code == 2
    assert not json.loads(text)["accused"]
    assert "No space left" in errors
    monkeypatch.setattr(noise._Draws, "next", lambda self, count: np.zeros(count, dtype=np.int64))
    large = ("--count", "400", "--guesses", "200")
    code, text, errors = run(capsys, *large, "--canaries", "gradients", "--json", "--out", str(tmp_path / "a.json"))
    assert code == 19
    assert json.loads(text)["accused"]
    assert "No space left" in errors


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
    assert "concordat-fl[client]" in errors
    entry = metadata.EntryPoint("canaries", "no_such_package.canaries", cli.MORE_VERBS)
    monkeypatch.setattr(metadata, "entry_points", lambda group: [entry] if group == cli.MORE_VERBS else [])
    code, _, errors = run(capsys)
    assert code == 2
    assert "no_such_package" in errors
    assert "concordat-fl[client]" in errors
