"""TAB in bash, through the very function that argcomplete registers, for each of the commands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent


def _offered(line: str, home: Path) -> list[str]:
    script = (
        f'eval "$(register-python-argcomplete {line.split()[0]})"\n'
        f"COMP_LINE={line!r} COMP_POINT={len(line)} COMP_TYPE=9\nCOMPREPLY=()\n"
        f'_python_argcomplete {line.split()[0]}\nprintf "%s\\n" "${{COMPREPLY[@]}}"\n'
    )
    path = f"{BIN}{os.pathsep}{os.environ.get('PATH', '')}"
    done = subprocess.run(
        ["bash", "-c", script], env=os.environ | {"PATH": path, "HOME": str(home)}, cwd=home, capture_output=True,
        text=True, timeout=60, check=False,
    )  # fmt: skip
    assert "Traceback" not in done.stdout + done.stderr
    return [each.strip() for each in done.stdout.splitlines() if each.strip()]


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("fl-admin runs pl", ["plan"]),
        ("fl-audit recon", ["reconcile"]),
        ("fl-audit verify --site ho", ["hospital-007"]),
        ("fl-client train-alone --sp", ["--spec"]),
        ("fl-client check --site ", ["hospital-007"]),
        ("fl-model insp", ["inspect"]),
        ("fl-server rot", ["rotate-key"]),
    ],
)
def test_tab_completes_in_every_command(line: str, wanted: list[str], tmp_path: Path) -> None:
    """Verbs, options, and the sites that have a home on this machine."""
    (tmp_path / ".concordat" / "site" / "hospital-007").mkdir(parents=True)
    assert _offered(line, tmp_path) == wanted
