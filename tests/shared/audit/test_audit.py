"""fl-audit as a person uses it: on a site's home, on a bundle, with a coordinator's receipts."""

from __future__ import annotations

import csv
import io
import json
import zipfile
from pathlib import Path
from typing import Any

import pytest

from fl_shared.audit.cli import VERBS, main
from fl_shared.cli.verbs import verb_name
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from fl_shared.privacy.accounting import pld_epsilon, rdp_epsilon
from helpers.ledgers import ROUND, SITE, opened, with_budget, with_releases
from helpers.specs import write_spec

KEY = SigningKey.generate()


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A site's home: six released rounds, one in doubt, one of the site's own; and the coordinator's receipts."""
    made = tmp_path / "home"
    KEY.save(made / "keys" / "signing.pem")
    (made / "site.toml").write_text("[policy]\nmin_noise_multiplier = 0.8\n")
    with opened(f"sqlite:///{made}/ledger.sqlite", KEY) as ledger:
        kept = with_releases(ledger, KEY, 6)
        ledger.charge_in_doubt(ledger.reserve("icd", ROUND, run="two", round=1), "the process died")
        ledger.settle(ledger.reserve("icd", ROUND, run="alone:two", round=1), ROUND, "sha256:local")
    (made / "receipts.json").write_text(json.dumps({"receipts": [one.to_dict() for one in kept]}))
    (made / "releases").mkdir()
    order = {
        "update_digest": kept[0].claims["update_digest"],
        "model_digest": "sha256:model",
        "adapter_digest": "sha256:adapter",
        "spec_digest": "sha256:spec",
    }
    (made / "releases" / "demo-1.json").write_text(json.dumps(order))
    return made


def audit(capsys: pytest.CaptureFixture[str], verb: str, *options: object, code: int = 0) -> str:
    """Run a verb in this process; its output."""
    capsys.readouterr()
    assert main([verb, *map(str, options)]) == code, capsys.readouterr().err
    return capsys.readouterr().out


def at(home: Path) -> tuple[str, ...]:
    return ("--site", SITE, "--home", str(home))


def test_every_verb_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    """Each verb answers to --help."""
    for verb in map(verb_name, VERBS):
        with pytest.raises(SystemExit) as stop:
            main([verb, "--help"])
        assert stop.value.code == 0
        assert verb in capsys.readouterr().out


def test_the_version_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """By name and number, with exit code 0."""
    with pytest.raises(SystemExit) as stop:
        main(["--version"])
    assert stop.value.code == 0
    assert capsys.readouterr().out.startswith("concordat 0.")


def test_what_the_scenarios_read(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The names in --json of budgets and spends, on which other programs rely."""
    (budget,) = json.loads(audit(capsys, "budgets", *at(home), "--json"))["budgets"]
    assert {"dataset", "epsilon", "delta", "spent", "left", "reserved", "used", "approver"} <= set(budget)
    assert budget["spent"] == pytest.approx(rdp_epsilon([ROUND] * 8, 1e-5))
    assert budget["left"] == pytest.approx(budget["epsilon"] - budget["spent"])
    found = json.loads(audit(capsys, "spends", *at(home), "--json"))
    assert [(row["run"], row["round"]) for row in found["spends"]][:2] == [("demo", 1), ("demo", 2)]
    assert found["spends"][0]["mechanism"] == ROUND.to_dict()
    assert {row["run"]: row["epsilon"] for row in found["runs"]}["two"] == pytest.approx(rdp_epsilon([ROUND], 1e-5))


def test_runs_by_themselves_and_in_all(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Each run's epsilon by two accountants, and the data set's when it ended; the last one is the whole."""
    rows = json.loads(audit(capsys, "runs", *at(home), "--json"))["runs"]
    assert [row["run"] for row in rows] == ["demo", "two", "alone:two"]
    assert [row["in_doubt"] for row in rows] == [0, 1, 0]
    for row, rounds, so_far in zip(rows, (6, 1, 1), (6, 7, 8), strict=True):
        assert row["epsilon"] == pytest.approx(rdp_epsilon([ROUND] * rounds, 1e-5))
        assert row["epsilon_pld"] == pytest.approx(pld_epsilon([ROUND] * rounds, 1e-5))
        assert row["cumulative"] == pytest.approx(rdp_epsilon([ROUND] * so_far, 1e-5))


@pytest.mark.parametrize("verb", ["budgets", "spends", "runs", "forecast"])
def test_tables_and_csv_hold_what_json_holds(home: Path, capsys: pytest.CaptureFixture[str], verb: str) -> None:
    """The CSV has the rows of the JSON; the table names the data set."""
    document = json.loads(audit(capsys, verb, *at(home), "--json"))
    rows = document[{"forecast": "budgets"}.get(verb, verb)]
    lines = list(csv.DictReader(io.StringIO(audit(capsys, verb, *at(home), "--csv"))))
    assert len(lines) == len(rows)
    assert "icd" in audit(capsys, verb, *at(home))


def test_the_forecast_is_what_the_ledger_then_grants(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So many rounds as the forecast says are granted, and not one more; with its noise the asked rounds fit."""
    found = json.loads(audit(capsys, "forecast", *at(home), "--rounds", 40, "--json"))
    left, noise = found["rounds_left"], found["budgets"][0]["noise_that_fits"]
    plan = json.loads(audit(capsys, "plan", *at(home), "--rounds", 40, "--noise", noise, "--json"))
    assert plan["granted"]
    audit(capsys, "plan", *at(home), "--rounds", 40, "--noise", noise - 0.001, code=11)
    assert found["past"][-1]["epsilon"] == pytest.approx(rdp_epsilon([ROUND] * 8, 1e-5))
    assert found["ahead"][-1]["round"] == left
    with opened(f"sqlite:///{home}/ledger.sqlite", KEY) as ledger:
        for number in range(left):
            ledger.reserve("icd", ROUND, run="next", round=number)
    assert json.loads(audit(capsys, "forecast", *at(home), "--json"))["rounds_left"] == 0
    audit(capsys, "plan", *at(home), "--rounds", 1, code=11)


def test_a_plan_reads_the_spec_that_would_be_launched(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A spec's mechanism and rounds are planned; the refusal says how many rounds fit; nothing is written."""
    before = (home / "ledger.sqlite").read_bytes()
    path = tmp_path / "next.toml"
    write_spec(path, sites=[SITE], rounds=3, steps_per_round=8)
    plan = json.loads(audit(capsys, "plan", *at(home), "--spec", path, "--json"))
    assert (plan["granted"], plan["rounds"], plan["mechanism"]) == (True, 3, ROUND.to_dict())
    assert plan["budgets"][0]["after"] == pytest.approx(rdp_epsilon([ROUND] * 11, 1e-5))
    write_spec(path, sites=[SITE], rounds=30, steps_per_round=8)
    refused = json.loads(audit(capsys, "plan", *at(home), "--spec", path, "--json", code=11))
    assert (
        refused["budgets"][0]["rounds_granted"]
        == json.loads(audit(capsys, "forecast", *at(home), "--json"))["rounds_left"]
    )
    assert (home / "ledger.sqlite").read_bytes() == before


def test_the_burn_down_curve_is_drawn(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In the terminal as bars, as PNG and as SVG; another ending is refused."""
    assert audit(capsys, "forecast", *at(home)).count("█") > 100
    for name, start in (("curve.png", b"\x89PNG"), ("curve.svg", b"<?xml")):
        audit(capsys, "forecast", *at(home), "--out", tmp_path / name)
        assert (tmp_path / name).read_bytes().startswith(start)
    audit(capsys, "forecast", *at(home), "--out", tmp_path / "curve.doc", code=2)


def test_a_bundle_is_checked_without_the_site(home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Exported with receipts, it verifies, reconciles and lists offline; under another key it does not."""
    bundle = tmp_path / "bundle.zip"
    audit(capsys, "export", *at(home), "--receipts", home / "receipts.json", "--out", bundle)
    elsewhere = tmp_path / "elsewhere"
    assert "INTACT" in audit(capsys, "verify", bundle, "--public-key", KEY.public_hex)
    offline = ("--site", SITE, "--home", elsewhere, "--ledger", bundle)
    assert "AGREE" in audit(capsys, "reconcile", *offline, "--receipts", bundle)
    here = json.loads(audit(capsys, "budgets", *at(home), "--json"))["budgets"]
    assert json.loads(audit(capsys, "budgets", *offline, "--json"))["budgets"] == here
    out = audit(capsys, "verify", bundle, "--public-key", SigningKey.generate().public_hex, code=13)
    assert "the auditor knows" in out


def test_a_bundle_cut_short_is_found_by_its_receipts(
    home: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Entries cut off at the end, and bundle.json made to agree, contradict the receipts."""
    with opened(f"sqlite:///{home}/ledger.sqlite", None) as ledger:
        pinned = ledger.entry(6)
    bundle = tmp_path / "bundle.zip"
    audit(capsys, "export", *at(home), "--receipts", home / "receipts.json", "--out", bundle)
    with zipfile.ZipFile(bundle) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    members["entries.jsonl"] = b"".join(members["entries.jsonl"].splitlines(keepends=True)[:6])
    about = json.loads(members["bundle.json"]) | {"entries": 6, "head": pinned.hash, "merkle_root": ""}
    members["bundle.json"] = json.dumps(about).encode()
    with zipfile.ZipFile(bundle, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    out = audit(capsys, "verify", bundle, "--public-key", KEY.public_hex, code=13)
    assert "entries were cut off" in out


def test_reconcile_names_each_divergence(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A lost receipt is missing, and the exit code says so; verify with the rest still finds nothing wrong."""
    rows = json.loads((home / "receipts.json").read_text())["receipts"]
    (home / "fewer.json").write_text(json.dumps({"receipts": rows[1:]}))
    found = json.loads(audit(capsys, "reconcile", *at(home), "--receipts", home / "fewer.json", "--json", code=13))
    assert [(each["kind"], each["run"], each["round"]) for each in found["divergences"]] == [("missing", "demo", 1)]
    assert "INTACT" in audit(capsys, "verify", *at(home), "--receipts", home / "fewer.json")


def test_a_restored_backup_is_found_by_the_receipts(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger put back to an old copy contradicts what the coordinator keeps: named by verify and by reconcile."""
    (home / "ledger.sqlite").unlink()
    with opened(f"sqlite:///{home}/ledger.sqlite", KEY) as ledger:
        with_budget(ledger)
        ledger.settle(ledger.reserve("icd", ROUND, run="demo", round=1), ROUND, "sha256:other")
    assert "NOT INTACT" in audit(capsys, "verify", *at(home), "--receipts", home / "receipts.json", code=13)
    out = audit(capsys, "reconcile", *at(home), "--receipts", home / "receipts.json", code=13)
    assert "EXTRA" in out
    assert "DIFFERENT" in out


@pytest.mark.parametrize(
    ("verb", "options", "word"),
    [
        ("forecast", ("--steps", "0"), "steps"),
        ("plan", ("--rounds", "-1"), "--rounds -1"),
        ("plan", ("--rounds", "3", "--noise", "0"), "noise_multiplier"),
        ("plan", ("--rounds", "3", "--noise", "nan"), "noise_multiplier"),
        ("plan", ("--rounds", "3", "--sampling", "1.5"), "sampling_probability"),
        ("plan", (), "number of rounds"),
        ("plan", ("--rounds", "3", "--study", "other"), "no budget for study 'other'"),
        ("forecast", ("--dataset", "other"), "not registered"),
        ("verify", ("--checkpoint", "x"), "checkpoint 'x'"),
        ("verify", ("--public-key", "abc"), "no Ed25519 public key"),
        ("statement", ("--run", "other"), "no run 'other'"),
        ("statement", ("--empirical", "/nowhere.json"), "no empirical audit"),
        ("reconcile", ("--receipts", "/nowhere.json"), "no receipts at"),
        ("budgets", ("--ledger", "/nowhere.zip"), "neither a bundle nor"),
        ("budgets", ("--ledger", "sqlite:////nowhere.sqlite"), "no ledger at"),
    ],
)
def test_wrong_values_are_named(
    home: Path, capsys: pytest.CaptureFixture[str], verb: str, options: tuple[str, ...], word: str
) -> None:
    """Each wrong option ends in one message that names the value and a next step, without a traceback."""
    capsys.readouterr()
    assert main([verb, *at(home), *options]) in {2, 13}
    error = capsys.readouterr().err
    assert word in error
    assert "fix:" in error
    assert "Traceback" not in error


def test_roles_are_printed_for_a_careful_owner(capsys: pytest.CaptureFixture[str]) -> None:
    """The SQL is shown before it is run; a name that could carry SQL is refused."""
    said = audit(capsys, "roles", "--auditor", "auditor", "--writer", "agent")
    assert "GRANT SELECT ON public.entries" in said
    assert "GRANT SELECT, INSERT ON public.entries" in said
    audit(capsys, "roles", "--auditor", "a; DROP TABLE entries", code=2)
    audit(capsys, "roles", code=2)


def statement(home: Path, capsys: pytest.CaptureFixture[str], *options: object) -> dict[str, Any]:
    out = home / "out"
    files = json.loads(audit(capsys, "statement", *at(home), "--out", out, "--json", *options))["files"]
    assert all(Path(name).is_file() for name in files)
    body: dict[str, Any] = json.loads(Path(files[0]).read_text())["body"]
    return body


def test_a_statement_says_what_nist_asks_for(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Unit, trust model, figures, delta against units, mechanisms, failures, digests, crosswalk: all there."""
    body = statement(home, capsys, "--receipts", home / "receipts.json")
    (dataset,) = body["datasets"]
    assert (dataset["privacy_unit"], dataset["units"], dataset["bound_per_unit"]) == ("record", 5000, 1)
    assert dataset["budgets"][0]["delta_times_units"] == pytest.approx(0.05)
    assert dataset["budgets"][0]["spent"] == pytest.approx(rdp_epsilon([ROUND] * 8, 1e-5))
    assert [row["run"] for row in body["runs"]] == ["demo", "two", "alone:two"]
    assert body["runs"][0]["mechanisms"] == [
        {
            "purpose": "training",
            "kind": "poisson-gaussian",
            "neighbouring": "add-or-remove-one",
            "clipping_norm": 1.0,
            "noise_multiplier": 1.0,
            "sampling_probability_claimed": 0.1,
            "sampling_probability_executed": 0.1,
            "steps_claimed": 48,
            "steps_executed": 48,
            "steps_charged_without_release": 0,
        }
    ]
    assert [(row["run"], row["outcome"], row["steps_charged"]) for row in body["failures"]] == [("two", "in-doubt", 8)]
    curve = body["curves"][0]
    at_delta = curve["deltas"].index(pytest.approx(1e-5))
    assert curve["epsilon_rdp"][at_delta] == pytest.approx(rdp_epsilon([ROUND] * 8, 1e-5))
    assert curve["epsilon_pld"][at_delta] == pytest.approx(pld_epsilon([ROUND] * 8, 1e-5))
    assert body["digests"]["releases"][0]["base_model"] == "sha256:model"
    assert body["digests"]["releases"][1]["base_model"] is None
    assert body["digests"]["policy"]["policy"] == {"min_noise_multiplier": 0.8}
    assert {row["provision"].split()[0] for row in body["crosswalk"]} == {"HIPAA", "GDPR", "EU"}
    assert body["ledger"]["checkpoints_held_against"] == 6
    assert body["not_claimed"]
    assert body["outside"]
    assert body["empirical_audit"] is None


def test_a_statement_of_one_run_keeps_the_cumulative_figures(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--run narrows runs, mechanisms and failures; what the data set has spent stays whole."""
    body = statement(home, capsys, "--run", "two")
    assert [row["run"] for row in body["runs"]] == ["two"]
    assert body["datasets"][0]["budgets"][0]["spent"] == pytest.approx(rdp_epsilon([ROUND] * 8, 1e-5))
    assert (home / "out" / f"statement-{SITE}-two.pdf").read_bytes().startswith(b"%PDF")


def test_a_statement_carries_an_empirical_audit(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The result of an attack is repeated as it stands, with the digest of its file."""
    (home / "attack.json").write_text('{"epsilon_lower": 1.25, "canaries": 1000}')
    body = statement(home, capsys, "--empirical", home / "attack.json")
    assert body["empirical_audit"]["result"]["epsilon_lower"] == 1.25
    assert "1.25" in (home / "out" / f"statement-{SITE}.html").read_text()


def test_a_statement_can_be_checked_and_every_change_is_found(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """JSON, HTML and PDF are covered by signatures: a change to any of them is refused, as is another key."""
    statement(home, capsys)
    files = {name: home / "out" / f"statement-{SITE}.{name}" for name in ("json", "html", "pdf")}
    check = ("--public-key", KEY.public_hex, "--check")
    for name in ("json", "html"):
        assert "files that fit" in audit(capsys, "statement", *check, files[name])
    for name, path in files.items():
        whole = path.read_bytes()
        place = whole.index(b"7" if name != "pdf" else b"endstream")
        path.write_bytes(whole[:place] + b"8" + whole[place + 1 :])
        audit(capsys, "statement", *check, files["json"], code=12)
        path.write_bytes(whole)
    stranger = SigningKey.generate().public_hex
    audit(capsys, "statement", "--public-key", stranger, "--check", files["json"], code=12)
    (home / "out" / f"statement-{SITE}.signatures.json").unlink()
    audit(capsys, "statement", *check, files["json"])
    audit(capsys, "statement", *check, files["html"], code=12)


def test_nothing_is_stated_about_a_broken_ledger(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A ledger that contradicts the coordinator's receipts, or another key's, gets no statement."""
    rows = json.loads((home / "receipts.json").read_text())["receipts"]
    rows[0]["document"]["body"]["ledger_entries"] = 999
    (home / "wrong.json").write_text(json.dumps({"receipts": rows}))
    audit(capsys, "statement", *at(home), "--receipts", home / "wrong.json", code=13)
    SigningKey.generate().save(home / "keys" / "other.pem")
    audit(capsys, "statement", *at(home), "--key", home / "keys" / "other.pem", code=12)
    assert not (home / "out").exists()


def test_public_data_is_never_called_private(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A data set that is declared public gets no guarantee in its statement."""
    home = tmp_path / "home"
    KEY.save(home / "keys" / "signing.pem")
    with Ledger.open(f"sqlite:///{home}/ledger.sqlite", KEY, SITE) as ledger:
        dataset = ledger.register_dataset("icd", "sha256:icd", "public", 5000, 1)
        ledger.set_budget(dataset, 8.0, 1e-5, "DPO")
        ledger.settle(ledger.reserve(dataset, ROUND, run="demo", round=1), ROUND, "sha256:a")
    body = statement(home, capsys)
    assert body["datasets"][0]["private"] is False
    page = (home / "out" / f"statement-{SITE}.html").read_text()
    assert "NO PRIVACY GUARANTEE" in page
    assert "-differentially private" not in page
