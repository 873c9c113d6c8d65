"""The privacy statement as its reader holds it: the PDF's text is read back with an independent reader."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pypdf import PdfReader

from fl_shared.audit.cli import main
from fl_shared.audit.report.facts import best_guess, statement_id
from fl_shared.identity.signing import SigningKey
from fl_shared.ledger import Ledger
from fl_shared.privacy.mechanism import Mechanism
from helpers.ledgers import ROUND, opened, with_budget

KEY = SigningKey.generate()
LONG = "a" * 30 + "-" + "b" * 32
SMALL = Mechanism(noise_multiplier=8.0, sampling_probability=0.02, steps=10, clipping_norm=1.0)
STATED = """
[statement]
institution = "Klinikum der Johann-Wolfgang-von-Goethe-Universität, Institut für Medizinische Informatik"
purpose = "Coding of discharge letters"
partners = ["University Hospital North", "City Clinics"]
approved_on = "2027-01-14"
contact = "dpo@example.org"
"""


def home(directory: Path, toml: str = "") -> Path:
    KEY.save(directory / "keys" / "signing.pem")
    (directory / "site.toml").write_text(toml)
    return directory


def pages(directory: Path, site: str, *options: str) -> list[str]:
    """Make the statement; the text of each page of its PDF, with single spaces."""
    out = directory / "out"
    assert main(["statement", "--site", site, "--home", str(directory), "--out", str(out), *options]) == 0
    (path,) = out.glob("*.pdf")
    return [" ".join(page.extract_text().split()) for page in PdfReader(path).pages]


def body_of(directory: Path) -> dict[str, object]:
    (path,) = (each for each in (directory / "out").glob("*.json") if "signatures" not in each.name)
    found: dict[str, object] = json.loads(path.read_text())["body"]
    return found


@pytest.fixture
def usual(tmp_path: Path) -> Path:
    """A site with eight charged rounds, one of them in doubt, and an open one."""
    made = home(tmp_path / "home", STATED)
    with opened(f"sqlite:///{made}/ledger.sqlite", KEY) as ledger:
        icd = with_budget(ledger)
        for number in range(1, 8):
            ledger.settle(ledger.reserve(icd, ROUND, run="demo", round=number), ROUND, f"sha256:{number:064x}")
        ledger.charge_in_doubt(ledger.reserve(icd, ROUND, run="demo", round=8), "the process died")
        ledger.reserve(icd, ROUND, run="demo", round=9)
    return made


def test_site_number_and_page_stand_on_every_page(usual: Path) -> None:
    """So that a page that was taken out or comes from elsewhere shows; the number is made from the contents."""
    found = pages(usual, "hospital-001")
    body = body_of(usual)
    assert body["id"] == statement_id(body)
    assert len(found) > 3
    for number, text in enumerate(found, 1):
        assert "Privacy statement of hospital-001" in text
        assert f"Statement {body['id']}" in text
        assert f"Page {number} of {len(found)}" in text
    page = (usual / "out" / "statement-hospital-001.html").read_text()
    assert f"Statement {body['id']}" in page
    assert "counter(page)" in page


def test_who_why_and_when_are_said_or_said_to_be_missing(usual: Path) -> None:
    """From [statement] in site.toml, from options before it, or "not stated"; the ledger's own date of approval too."""
    first = pages(usual, "hospital-001")[0]
    for said in ("Goethe-Universität", "Coding of discharge letters", "University Hospital North; City Clinics"):
        assert said in first
    for said in ("2027-01-14", "dpo@example.org", "DPO Jane Doe, entered in the ledger on"):
        assert said in first
    given = ("--purpose", "Another", "--partner", "A", "--partner", "B", "--approved-on", "2027-02-28")
    first = pages(usual, "hospital-001", *given)[0]
    assert "Another" in first
    assert "A; B" in first
    assert "2027-02-28" in first
    (usual / "site.toml").write_text("")
    assert pages(usual, "hospital-001")[0].count("not stated") >= 5


@pytest.mark.parametrize(
    ("toml", "word"),
    [
        ('[statement]\napproved_on = "soon"', "approved_on is 'soon'"),
        ('[statement]\nparners = ["x"]', "parners"),
        ("statement = 3", "not a table"),
    ],
)
def test_a_wrong_word_of_the_site_is_named(
    usual: Path, capsys: pytest.CaptureFixture[str], toml: str, word: str
) -> None:
    """A date that is none and a field of another name end before anything is written."""
    (usual / "site.toml").write_text(toml)
    assert main(["statement", "--site", "hospital-001", "--home", str(usual), "--out", str(usual / "out")]) == 2
    assert word in capsys.readouterr().err
    assert not (usual / "out").exists()


def test_epsilon_is_explained_in_words_and_both_percentages_too(usual: Path) -> None:
    """What the figures bound, an example with the right numbers, and why epsilon and gate differ, with both shares."""
    text = " ".join(pages(usual, "hospital-001"))
    budget = body_of(usual)["datasets"][0]["budgets"][0]  # type: ignore[index]
    share, gate = budget["spent"] / budget["epsilon"], budget["gate_used"]
    assert share - gate > 0.05
    assert f"Why epsilon stands at {share:.0%} of the ceiling and the gate at {gate:.0%}" in text
    assert f"a factor of {math.exp(8):,.0f}" in text
    assert "at most 99.97 % at the ceiling" in text
    assert "at most e^epsilon times what it would be if that record were not in the data, plus delta" in text
    assert [point["round"] for point in budget["burn_down"]] == list(range(1, 10))
    assert budget["burn_down"][-1]["used"] == pytest.approx(gate)
    assert "How the budget was used: icd, overall" in text


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.1, 1e-6), (1.0, 1e-5), (8.0, 1e-3), (400.0, 1e-9)])
def test_the_best_guess_is_the_best_that_epsilon_allows(epsilon: float, delta: float) -> None:
    """Against a search over all tests whose errors (a, b) an (epsilon, delta) mechanism can allow."""
    best = 0.0
    for step in range(20_001):
        miss = step / 20_000  # the smallest false-alarm rate that the two inequalities then leave
        alarm = max(0.0, 1 - delta - math.exp(epsilon) * miss, math.exp(-epsilon) * (1 - delta - miss))
        best = max(best, 1 - (alarm + miss) / 2)
    assert best - 1e-12 <= best_guess(epsilon, delta) <= best + 1e-4


def test_there_is_room_to_sign(usual: Path) -> None:
    """Lines for name, function, date and signature of two persons, on one page, in the PDF and in the page."""
    (text,) = (page for page in pages(usual, "hospital-001") if "By signing" in page)
    for word in ("Name", "Function", "Date", "Signature"):
        assert text.count(f" {word}") >= 2
    assert "For the site" in text
    assert "Data protection officer" in text
    assert 'class="sign"' in (usual / "out" / "statement-hospital-001.html").read_text()


def test_the_signed_document_is_attached(usual: Path) -> None:
    """What the PDF carries is the signed JSON."""
    pages(usual, "hospital-001")
    ((name, found),) = PdfReader(usual / "out" / "statement-hospital-001.pdf").attachments.items()
    assert json.loads(found[0]) == json.loads((usual / "out" / name).read_text())


def test_nothing_was_spent(tmp_path: Path) -> None:
    """A ledger with a budget and no charge: the words say so, and no figure is missing."""
    made = home(tmp_path / "home")
    with opened(f"sqlite:///{made}/ledger.sqlite", KEY) as ledger:
        with_budget(ledger)
    text = " ".join(pages(made, "hospital-001"))
    assert "Nothing has been charged to it yet" in text
    assert "in at most 50.01 % after what was charged so far (epsilon 0)" in text


def test_long_names_many_runs_and_data_sets(tmp_path: Path) -> None:
    """A site's name of 63 letters, two data sets, a study and 60 runs: nothing is cut, every run is there."""
    made = home(tmp_path / "home")
    with Ledger.open(f"sqlite:///{made}/ledger.sqlite", KEY, LONG) as ledger:
        for name in ("icd", "radiology-reports-2019-2024"):
            dataset = ledger.register_dataset(name, f"hmac-sha256:{name:0<52}", "patient", 50_000, 4)
            ledger.set_budget(dataset, 8.0, 1e-6, "Dr. iur. Maximiliane von Schwarzenfels-Hohenstein")
            ledger.set_budget(dataset, 4.0, 1e-6, "DPO", study="sepsis")
        for number in range(60):
            held = ledger.reserve("icd", SMALL, run=f"run-{number:03d}", round=1, study="sepsis")
            ledger.settle(held, SMALL, f"sha256:{number:064x}")
    found = pages(made, LONG)
    text = " ".join(found)
    assert all(f"Privacy statement of {LONG}" in page for page in found)
    assert all(f"run-{number:03d} icd 1" in text for number in range(60))
    assert "How the budget was used: icd, study sepsis" in text
    assert text.count("Schwarzenfels-Hohenstein, entered in the ledger on") == 2
