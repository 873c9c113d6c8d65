"""What keeps the house in order works: hooks, spelling, the editor's settings, and the page for newcomers."""

from __future__ import annotations

import configparser
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers import index

ROOT = Path(__file__).resolve().parents[1]
BIN = Path(sys.executable).parent


def lines_of(target: str) -> list[str]:
    """The commands of a target of the Makefile, with the environment's programs as .venv/bin has them."""
    text = (ROOT / "Makefile").read_text("utf-8")
    found = re.search(rf"^{target}:.*\n((?:\t.*\n)+)", text, flags=re.MULTILINE)
    assert found is not None
    return [line.strip().removeprefix("@").replace("$(BIN)", ".venv/bin") for line in found[1].splitlines()]


def hooks() -> list[dict[str, Any]]:
    """The hooks of .pre-commit-config.yaml."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text("utf-8"))
    assert [repo["repo"] for repo in config["repos"]] == ["local"]
    return [hook for repo in config["repos"] for hook in repo["hooks"]]


def test_the_hooks_are_what_make_lint_runs() -> None:
    """The same commands in the same order, from the project's own environment."""
    assert [hook["entry"] for hook in hooks()] == lines_of("lint")
    assert {hook["language"] for hook in hooks()} == {"system"}
    assert {Path(hook["entry"].split()[0]).name for hook in hooks()} == {"ruff", "lint-imports", "codespell"}


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository of one file with this project's settings and environment."""
    for name in ("pyproject.toml", ".pre-commit-config.yaml", ".editorconfig"):
        shutil.copy(ROOT / name, tmp_path / name)
    (tmp_path / ".venv").mkdir()
    (tmp_path / ".venv" / "bin").symlink_to(BIN)
    (tmp_path / "clean.py").write_text('"""A module."""\n', "utf-8")
    subprocess.run(["git", "init", "-q", tmp_path], check=True)
    return tmp_path


def run_hook(checkout: Path, hook: str) -> subprocess.CompletedProcess[str]:
    """pre-commit with one hook over every file that git knows, with no network to ask."""
    subprocess.run(["git", "add", "-A", "--", ":!.venv"], cwd=checkout, check=True)
    nowhere = {f"{scheme}_proxy": "http://127.0.0.1:9" for scheme in ("http", "https")}
    environment = {**os.environ, **nowhere, "PRE_COMMIT_HOME": str(checkout / ".venv" / "cache")}
    return subprocess.run(
        [BIN / "pre-commit", "run", hook, "--all-files"],
        cwd=checkout, env=environment, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("hook", "name", "wrong", "told"),
    [
        ("ruff-check", "wrong.py", '"""A module."""\n\nimport os\n', "F401"),
        ("ruff-check", "wrong.py", '"""A module."""\n\nimport pickle\n\nprint(pickle)\n', "TID251"),
        ("ruff-format", "wrong.py", '"""A module."""\n\nx = [1,2]\n', "would be reformatted"),
        ("codespell", "wrong.md", "The budgets are sep-erate.\n".replace("-", ""), "separate"),
        ("codespell", "wrong.py", '"""What is rec-ieved."""\n'.replace("-", ""), "received"),
    ],
)
def test_a_hook_stops_what_is_wrong_and_passes_what_is_right(
    checkout: Path, hook: str, name: str, wrong: str, told: str
) -> None:
    """Run as git would run it, before and after a wrong file."""
    right = run_hook(checkout, hook)
    assert right.returncode == 0, right.stdout + right.stderr
    assert "Passed" in right.stdout
    (checkout / name).write_text(wrong, "utf-8")
    stopped = run_hook(checkout, hook)
    assert stopped.returncode == 1
    assert told in stopped.stdout


def test_the_fields_own_words_are_not_misspellings(checkout: Path) -> None:
    """Names and headers that a list of common mistakes knows as mistakes."""
    (checkout / "words.md").write_text("Bu et al. and the header TE.\n", "utf-8")
    assert run_hook(checkout, "codespell").returncode == 0


def test_the_editors_settings_are_those_of_the_formatter() -> None:
    """One length of line, one indent."""
    read = configparser.ConfigParser()
    read.read_string("[top]\n" + (ROOT / ".editorconfig").read_text("utf-8"))
    assert read["*.py"]["max_line_length"] == "120"
    assert "line-length = 120" in (ROOT / "pyproject.toml").read_text("utf-8")
    assert read["Makefile"]["indent_style"] == "tab"


def test_every_target_that_the_page_for_newcomers_names_exists() -> None:
    """`make X` in CONTRIBUTING.md is a target."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), flags=re.MULTILINE))
    named = set(re.findall(r"\bmake ([a-z]+)\b", (ROOT / "CONTRIBUTING.md").read_text("utf-8")))
    assert {"quick", "test", "lint", "types", "index"} <= named
    assert named <= targets


def test_every_place_that_the_page_for_newcomers_names_exists() -> None:
    """Paths in backticks, and the scripts of benchmarks and scenarios; a room in brackets on the map may be to come."""
    text = (ROOT / "CONTRIBUTING.md").read_text("utf-8")
    places = set(re.findall(r"`(?:python )?((?:client|server|shared|tests|scenarios|docs)/[\w./-]+)", text))
    assert len(places) > 20
    arriving = {
        f"{part}/{package}/{room.strip('()')}/"
        for package, part in index.PACKAGES.items()
        for layer in index.floors(package)
        for room in layer
        if room.startswith("(")
    }
    assert {place for place in places if not (ROOT / place).exists()} <= arriving


@pytest.mark.parametrize(
    ("you_bring", "neighbour"),
    [
        ("a verb of `fl-audit`", "budgets.py"),
        ("an aggregator", "mean.py"),
        ("a model family", "mixtral.py"),
        ("a query of the ledger", "def current_budgets"),
        ("a field of `server.toml`", "certificate_days"),
        ("something that leaves a site", "def release"),
    ],
)
def test_a_newcomer_finds_what_is_like_what_he_brings(you_bring: str, neighbour: str) -> None:
    """The place in the table is where the others of the kind lie: a file in the folder, or a name in the file."""
    row = next(line for line in (ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines() if you_bring in line)
    found = re.search(r"`((?:client|server|shared)/[\w./-]+)`", row)
    assert found is not None
    place = ROOT / found[1]
    there = (place / neighbour).exists() if place.is_dir() else neighbour in place.read_text("utf-8")
    assert there, f"CONTRIBUTING.md sends {you_bring} to {found[1]}, where no {neighbour!r} is: write the present place"


def test_the_page_for_newcomers_is_one_page() -> None:
    """What nobody reads to its end holds nobody to anything."""
    assert len((ROOT / "CONTRIBUTING.md").read_text("utf-8").splitlines()) <= 100
    assert len([line for line in (ROOT / "SECURITY.md").read_text("utf-8").splitlines()[1:] if line]) == 3
