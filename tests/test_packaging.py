"""What is installed is what the layout promises: clear names, no stray torch, locked versions."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPTS = ("fl-admin", "fl-audit", "fl-client", "fl-model", "fl-server")
HEAVY = ("torch", "opacus", "peft", "transformers")


@pytest.mark.parametrize("module", ["fl_shared.audit.cli", "fl_server.cli.server", "fl_server.cli.admin"])
def test_coordinator_and_auditor_never_load_torch(module: str) -> None:
    """Importing the coordinator's or the auditor's command loads none of the site's heavy packages."""
    code = f"import sys, {module}; print([m for m in {HEAVY!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_auditor_loads_no_flower() -> None:
    """The auditor's install is fl_shared alone: neither Flower nor server or client code is loaded."""
    unwanted = ("flwr", "fl_server", "fl_client")
    code = f"import sys, fl_shared.audit.cli; print([m for m in {unwanted!r} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_and_completion_wait_for_no_document(script: str, tmp_path: Path) -> None:
    """pydantic is loaded when the first document is read, and not before: both work where it cannot be loaded."""
    module = importlib.metadata.entry_points(group="console_scripts")[script].value.partition(":")[0]
    code = f"import runpy, sys; sys.modules['pydantic'] = None; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert script in done.stdout
    offered = tmp_path / "offered"
    asked = {"_ARGCOMPLETE": "1", "_ARGCOMPLETE_STDOUT_FILENAME": str(offered), "COMP_LINE": f"{script} --h"}
    asked |= {"COMP_POINT": str(len(asked["COMP_LINE"])), "COMP_TYPE": "9"}
    subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, env=os.environ | asked)
    assert "--help" in offered.read_text(encoding="utf-8")


def test_no_package_with_a_common_name_is_installed() -> None:
    """Nobody's site-packages gets a package called server, client or shared from us."""
    for name in ("server", "client", "shared"):
        owners = importlib.metadata.packages_distributions().get(name, [])
        assert "concordat-fl" not in owners


def test_constraints_are_names_and_versions_only() -> None:
    """The lock holds name==version and no address."""
    for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines():
        assert line.startswith("#") or re.fullmatch(r"[A-Za-z0-9_.-]+==[A-Za-z0-9_.!]+", line), line


def test_every_direct_dependency_is_locked() -> None:
    """Whatever pyproject names stands in constraints.txt."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [
        *project["dependencies"],
        *(each for extra in project["optional-dependencies"].values() for each in extra),
    ]
    locked = {
        re.sub(r"[-_.]+", "-", line.partition("==")[0]).lower()
        for line in (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    }
    names = {re.sub(r"[-_.]+", "-", re.split(r"[\[<>=!~ ]", each)[0]).lower() for each in wanted}
    assert names <= locked, names - locked


@pytest.mark.parametrize("script", SCRIPTS)
def test_help_has_examples(script: str) -> None:
    """Every command explains itself and shows an example."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / script), "--help"], capture_output=True, text=True, check=True
    )
    assert "example" in done.stdout.lower()


@pytest.mark.parametrize("script", SCRIPTS)
def test_nonsense_gets_an_error_and_no_traceback(script: str) -> None:
    """An unknown verb ends with exit code 2 and a usage line."""
    done = subprocess.run(
        [str(Path(sys.executable).parent / script), "no-such-verb"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
