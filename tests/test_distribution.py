"""The wheel and the source distribution that `make dist` writes, installed as a stranger would."""

from __future__ import annotations

import email.parser
import os
import re
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from fl_shared import __version__
from fl_shared.cli.extras import EXTRAS, extra_of, install_command

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WHEEL = f"concordat_fl-{__version__}-py3-none-any.whl"
# Under which name a package that pyproject.toml names is imported, where that is another one.
IMPORTED = {"prometheus-client": "prometheus_client", "nvidia-ml-py": "pynvml", "psycopg[binary]": "psycopg",
            "fpdf2": "fpdf", "simple-icd-10-cm": "simple_icd_10_cm"}  # fmt: skip


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with both files, built by the Makefile's own line."""
    out = tmp_path_factory.mktemp("dist")
    recipe = next(line for line in (ROOT / "Makefile").read_text(encoding="utf-8").splitlines() if "hatchling" in line)
    words = recipe.replace("$(BIN)/python", sys.executable).replace("--directory dist", f"--directory {out}").split()
    subprocess.run(words, cwd=ROOT, check=True, capture_output=True, timeout=120)
    return out


@pytest.fixture(scope="module")
def fresh(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel in it; the packages that it depends on are this environment's."""
    place = tmp_path_factory.mktemp("fresh") / "en v"
    venv.create(place, with_pip=False, symlinks=True)
    wheel = dist / WHEEL
    subprocess.run(pip(place, "install", "--no-deps", str(wheel)), check=True, capture_output=True, timeout=120)
    packages = next(place.glob("lib/python3*/site-packages"))
    others = [each for each in sys.path if each.endswith(("site-packages", "dist-packages"))]
    (packages / "others.pth").write_text("\n".join(others) + "\n")  # their .pth files, ours among them, are not read
    return place


def pip(place: Path, *words: str) -> list[str]:
    """A line that runs this environment's pip for the environment at `place`, without an index."""
    return [sys.executable, "-m", "pip", "--python", str(place / "bin" / "python"), *words, "--no-index"]


def test_the_wheel_says_what_it_is(dist: Path) -> None:
    """Name, version, extras and the five commands; nothing of tests or scenarios, and the base model is in it."""
    with zipfile.ZipFile(dist / WHEEL) as archive:
        names = set(archive.namelist())
        about = archive.read(f"concordat_fl-{__version__}.dist-info/METADATA").decode()
        commands = archive.read(f"concordat_fl-{__version__}.dist-info/entry_points.txt").decode()
    told = email.parser.Parser().parsestr(about)
    assert (told["Name"], told["Version"]) == ("concordat-fl", __version__)
    assert set(told.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])
    assert set(re.findall(r"^(fl-[a-z]+) = ", commands, flags=re.MULTILINE)) == set(PROJECT["scripts"])
    tops = {name.split("/")[0] for name in names}
    assert tops == {"fl_shared", "fl_server", "fl_client", f"concordat_fl-{__version__}.dist-info"}
    assert "fl_client/model/tiny/model.safetensors" in names


def test_the_source_distribution_holds_the_sources(dist: Path) -> None:
    """What is needed to build and test again, and nothing that a build or a run left behind."""
    with tarfile.open(dist / f"concordat_fl-{__version__}.tar.gz") as archive:
        names = archive.getnames()
    inside = {name.split("/", 1)[1] for name in names}
    assert {"pyproject.toml", "LICENSE", "README.md", "Makefile", "constraints.txt", "tests/test_docs.py"} <= inside
    assert not [name for name in inside if re.search(r"(^|/)(\.venv|__pycache__|dist|out)/", name)]


@pytest.mark.parametrize("command", sorted(PROJECT["scripts"]))
def test_every_command_of_the_wheel_says_its_version(command: str, fresh: Path, tmp_path: Path) -> None:
    """Installed from the wheel, each command answers, and it is the wheel's code that does."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    line = [str(fresh / "bin" / command), "--version"]
    done = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=False)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, f"concordat {__version__}", "")
    line = [str(fresh / "bin" / "python"), "-c", "import fl_shared; print(fl_shared.__file__)"]
    where = subprocess.run(line, capture_output=True, text=True, cwd=tmp_path, env=environment, timeout=60, check=True)
    assert where.stdout.startswith(str(fresh))


def test_what_a_fix_tells_to_type_works_after_an_installation_from_the_wheel(fresh: Path) -> None:
    """`pip install 'concordat-fl[report]'` keeps the installed wheel, asks no index for it and adds the extra."""
    wanted = install_command("report").rpartition(" ")[2].strip("'")
    done = subprocess.run(pip(fresh, "install", wanted), capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"Requirement already satisfied: {wanted}" in done.stdout


def test_every_optional_package_is_known_with_its_extra() -> None:
    """The table behind the fix texts is what pyproject.toml says."""
    told = {
        extra: {IMPORTED.get(name, name) for name in (re.split(r"[<>=]", each)[0] for each in packages)}
        for extra, packages in PROJECT["optional-dependencies"].items()
        if extra != "dev"
    }
    assert {extra: set(modules) for extra, modules in EXTRAS.items()} == told


@pytest.mark.parametrize(
    ("module", "ours", "extra"),
    [
        ("torch", "fl_client", "client"), ("httpx", "fl_client", "client"), ("httpx", "fl_server", "server"),
        ("matplotlib", "fl_shared", "report"), ("psycopg", "fl_server", "postgres"), ("torch", "fl_shared", "client"),
        ("accelerate", "fl_client", "client"), ("numpy", "fl_shared", ""),
    ],
)  # fmt: skip
def test_the_extra_that_is_named_is_the_commands_own(module: str, ours: str, extra: str) -> None:
    """A package of several extras is brought by that of the command; what a package needs itself, too."""
    assert extra_of(module, ours) == extra


def told_to_install(text: str) -> list[str]:
    """What `text` tells to `pip install`, as far as it looks like this project, line breaks and options aside."""
    words = [each.group(1).split() for each in re.finditer(r"pip install\s+([^`&|#]{0,200})", text)]
    return [
        word.strip("\"'`,.;:()")
        for line in words
        for word in line
        if re.match(r"[\"'`]?([\w./]*/)?concordat[\w-]*", word) and not word.startswith("/opt/")
    ]


def test_nobody_is_told_to_install_a_strangers_package() -> None:
    """No tracked file says `pip install concordat`, which is another project on the index."""
    listed = ["git", "ls-files", "-z"]
    tracked = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout
    wrong = []
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        if path == Path(__file__).resolve() or not path.is_file() or path.suffix in {".safetensors", ".pdf", ".png"}:
            continue
        found = told_to_install(path.read_text(encoding="utf-8", errors="replace"))
        wrong += [(name, each) for each in found if not re.match(r"(\S*/)?concordat[-_]fl\b", each)]
    assert not wrong
    assert told_to_install('`pip install\nconcordat` alone; pip install -c x "concordat[server]"') == [
        "concordat", "concordat[server]"
    ]  # fmt: skip


def test_documents_say_where_the_wheel_comes_from() -> None:
    """Nothing is on an index: whoever reads a document is told of the file that `make dist` writes."""
    for document in [ROOT / "README.md", *ROOT.glob("docs/*.md")]:
        for each in told_to_install(document.read_text(encoding="utf-8")):
            assert each.partition("[")[0].endswith(WHEEL), (document.name, each)
    assert "make dist" in (ROOT / "README.md").read_text(encoding="utf-8")
