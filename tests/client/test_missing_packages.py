"""Each command without each optional package: one line that names it, its extra and what to type; never a traceback.

Real processes in which the import system does not find the package, as where it was never installed.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fl_shared.cli.extras import EXTRAS, install_command
from fl_shared.errors import DEFECT
from fl_shared.identity.signing import SigningKey
from helpers.agents import RealSite, spec
from helpers.gateway import Gateway
from helpers.ledgers import opened, story
from helpers.parsers import COMMANDS, VERBS
from helpers.specs import to_toml

BIN = Path(sys.executable).parent
OPTIONAL = sorted({module for modules in EXTRAS.values() for module in modules})
HIDING = """
import importlib.machinery, os

hidden = set(os.environ["HIDDEN"].split(","))
found = importlib.machinery.PathFinder.find_spec
asked = set()


def find_spec(name, path=None, target=None):
    asked.add(name.partition(".")[0])
    return None if name.partition(".")[0] in hidden else found(name, path, target)


importlib.machinery.PathFinder.find_spec = staticmethod(find_spec)
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An enrolled site with data and a ledger, a coordinator's home, a spec, and the module that hides packages."""
    root = tmp_path_factory.mktemp("place")
    for name in ("gateway", "hiding"):
        (root / name).mkdir()
    (root / "hiding" / "sitecustomize.py").write_text(HIDING)
    gateway = Gateway(root / "gateway")
    site = RealSite(root / "site", gateway)
    gateway.close()
    run = spec("sha256:" + "1" * 64)
    (root / "spec.toml").write_text(to_toml(run.to_dict()))
    ledger = opened(f"sqlite:///{site.home.ledger}", SigningKey.load(site.home.signing_key))
    story(ledger)
    ledger.close()
    called(root, "fl-server init --home coordinator")
    return root


def called(place: Path, line: str, *hidden: str) -> subprocess.CompletedProcess[str]:
    """Run a command in `place` without the hidden packages."""
    words = shlex.split(line)
    return subprocess.run(
        [str(BIN / words[0]), *words[1:]], cwd=place, env=environment(place, *hidden), capture_output=True, text=True,
        timeout=120, check=False,
    )  # fmt: skip


def environment(place: Path, *hidden: str) -> dict[str, str]:
    """A process's environment in which these packages are not found."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("FL_", "CONCORDAT_"))}
    return kept | {"HIDDEN": ",".join(hidden), "PYTHONPATH": str(place / "hiding"), "OMP_NUM_THREADS": "1"}


AT = "--site hospital-001 --home site"
MODEL = "--spec spec.toml --adapter spec.toml"
NEEDED = {
    "fl-server up --home coordinator": ("server", EXTRAS["server"]),
    "fl-server status --home coordinator": ("server", ["httpx"]),
    "fl-server restore x.tar --home new --database postgresql://u@127.0.0.1:1/x": ("postgres", []),
    f"fl-client run {AT}": ("client", EXTRAS["client"]),
    f"fl-client enroll {AT} --server https://127.0.0.1:1 --token ct1.hospital-001.{'x' * 32}.{'0' * 64}": (
        "client", ["httpx"],
    ),
    f"fl-client train-alone {AT} --spec spec.toml --out alone": ("client", ["torch", "opacus", "peft"]),
    f"fl-client evaluate {AT} {MODEL}": ("client", ["torch", "opacus", "transformers"]),
    "fl-audit canaries": ("client", ["torch", "transformers", "peft", "opacus"]),
    f"fl-audit statement {AT} --out statements": ("report", EXTRAS["report"]),
    f"fl-audit forecast {AT} --dataset icd --rounds 2 --noise 1 --sampling 0.1 --steps 8 --out curve.svg": (
        "report", ["matplotlib"],
    ),
    "fl-audit budgets --site hospital-001 --ledger postgresql://u@127.0.0.1:1/x": ("postgres", ["psycopg"]),
    "fl-model inspect tiny": ("client", ["torch", "safetensors", "transformers"]),
    "fl-model quantize site quantised": ("client", ["torch", "safetensors"]),
    f"fl-model evaluate {MODEL} --data site/records.csv": ("client", ["torch", "peft", "opacus"]),
    f"fl-model export-adapter {MODEL} peft": ("client", ["torch", "peft", "transformers"]),
    "fl-model build tiny --out built": ("demo", ["simple_icd_10_cm"]),
}  # fmt: skip


@pytest.mark.parametrize(
    ("line", "extra", "module"),
    [(line, extra, module) for line, (extra, modules) in NEEDED.items() for module in modules],
    ids=lambda each: each if each in OPTIONAL else " ".join(each.split()[:2]),
)
def test_a_verb_that_needs_a_missing_package_says_what_to_type(line: str, extra: str, module: str, place: Path) -> None:
    """Exit code 2, nothing on standard output, the package and its extra in one line, the command in the next."""
    done = called(place, line, module)
    lines = done.stderr.splitlines()
    assert (done.returncode, done.stdout, len(lines)) == (2, "", 2), done.stderr
    assert lines[0].startswith("error: ")
    assert module in lines[0]
    assert repr(extra) in lines[0]
    assert lines[1] == f"fix: {install_command(extra)}"


SWEPT = {
    "fl-server": "fl-server issued --home coordinator",
    "fl-admin": "fl-admin status --profile coordinator/admin/admin.toml",
    "fl-client": f"fl-client status {AT}",
    "fl-audit": f"fl-audit budgets {AT}",
    "fl-model": "fl-model inspect tiny",
}


# One interpreter for each package: what a command imported in vain is not in sys.modules, so the next one tries again.
SWEEP = """
import contextlib, io, json, shlex, sitecustomize, sys
from importlib import metadata

scripts = {script.name: script for script in metadata.entry_points(group="console_scripts")}
told = {}
for line in sys.argv[1:]:
    sys.argv = shlex.split(line)
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = scripts[sys.argv[0]].load()()
        except SystemExit as end:
            code = end.code
    told[sys.argv[0]] = [code or 0, err.getvalue()]
print(json.dumps({"told": told, "asked": sorted(sitecustomize.asked)}))
"""

Told = dict[str, tuple[int, str]]


def sweep(place: Path, lines: list[str], *hidden: str) -> tuple[Told, set[str]]:
    """What each line's command ends with and says on standard error without the hidden packages; what they looked for,
    found or not."""
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, *lines],
        cwd=place, env=environment(place, *hidden), capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    answer = json.loads(done.stdout.splitlines()[-1])
    return answer["told"], set(answer["asked"])


@pytest.fixture(scope="module")
def whole(place: Path) -> dict[str, tuple[Told, set[str]]]:
    """Each command where nothing is missing: what it says, and which modules it looks for."""
    return {command: sweep(place, [line]) for command, line in SWEPT.items()}


@pytest.fixture(scope="module", params=OPTIONAL)
def swept(request: pytest.FixtureRequest, place: Path, whole: dict[str, tuple[Told, set[str]]]) -> tuple[str, Told]:
    """A package, and what each command ends with and says on standard error without it.

    A command that does not look for the package cannot miss it: it is not run again.
    """
    module: str = request.param
    lines = [line for command, line in SWEPT.items() if module in whole[command][1]]
    same = {name: said for told, _ in whole.values() for name, said in told.items()}
    return module, same | (sweep(place, lines, module)[0] if lines else {})


@pytest.mark.parametrize("command", sorted(SWEPT))
def test_no_missing_package_is_a_defect(command: str, swept: tuple[str, Told]) -> None:
    """Whatever is missing, a command works as ever, or names it: no traceback, no `internal error`."""
    module, told = swept
    code, errors = told[command]
    assert "Traceback" not in errors
    assert "internal error" not in errors
    assert code != DEFECT
    if code == 2:
        assert errors.startswith(f"error: the package {module} is not installed")


def test_json_errors_name_the_package_too(place: Path) -> None:
    """With --json the missing package is one JSON object with a code of its own."""
    done = called(place, "fl-model inspect tiny --json", "torch")
    assert done.stdout == ""
    told = json.loads(done.stderr)
    assert (told["code"], told["exit_code"], told["fix"]) == ("missing-package", 2, install_command("client"))


@pytest.mark.parametrize("module", ["torch", "transformers", "uvicorn", "starlette", "pynvml"])
def test_check_reports_a_missing_package_as_a_line(module: str, place: Path) -> None:
    """`fl-client check` goes on: the packages fail with the line to type, and what does not need them still passes."""
    done = called(place, f"fl-client check {AT} --json", module)
    found = {each["name"]: each for each in json.loads(done.stdout)["checks"]}
    assert done.stderr == ""
    assert found["packages"]["ok"] == (module == "pynvml")  # GPU use in the metrics is left out, nothing else
    assert found["data"]["ok"]
    assert found["model"]["ok"] == (module not in ("torch", "transformers"))
    if module != "pynvml":
        assert found["packages"]["fix"] == install_command("client")
        assert module in found["packages"]["message"]


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_help_needs_no_optional_package(command: str, place: Path) -> None:
    """With the bare distribution each command, and the first and last of its verbs, explains itself."""
    paths = [path for path in VERBS if path[0] == command]
    for path in [(command,), paths[0], paths[-1]]:
        done = called(place, f"{shlex.join(path)} --help", *OPTIONAL)
        assert (done.returncode, done.stderr) == (0, ""), path
        assert "examples:" in done.stdout


def test_a_site_without_the_client_s_packages_spends_nothing(place: Path) -> None:
    """A training that could not run is refused before anything is reserved."""
    ledger = place / "site" / "ledger.sqlite"
    before = ledger.read_bytes()
    called(place, f"fl-client train-alone {AT} --spec spec.toml --out alone", "opacus")
    assert ledger.read_bytes() == before
