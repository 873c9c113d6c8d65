"""Every benchmark starts, says what it does, and has a way that takes about a minute and prints one JSON object."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import warm

HERE = Path(__file__).parent
SCRIPTS = sorted(file for file in HERE.glob("*.py") if not file.name.startswith("test_"))
# Short by themselves; the others have --quick.
SHORT = {"dp_step.py", "quantisation.py", "invariance.py", "orders.py"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda file: file.name)
def test_help_says_what_it_measures_and_how(script: Path, tmp_path: Path) -> None:
    """`--help` works in any directory, names --json, and --quick where the default takes long."""
    done = warm.run(str(script), "--help", env=os.environ, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "--json" in done.stdout
    assert script.name in SHORT or "--quick" in done.stdout
    assert f"tests/benchmarks/{script.name}" in done.stdout, "an example line"


def test_a_quick_run_prints_one_object() -> None:
    """The ledger's, for one: standard output is one JSON object, whatever is said on the way."""
    line = [sys.executable, str(HERE / "ledger.py"), "--json", "--entries", "2000"]
    done = subprocess.run(line, capture_output=True, text=True, check=False, timeout=250)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["entries"] >= 2000
    assert found["verify_vs_signature_limit"] > 0
