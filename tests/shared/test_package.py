"""The package itself."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
from pathlib import Path

import fl_shared

ROOT = Path(__file__).resolve().parents[2]


def test_the_version_is_the_distribution_s() -> None:
    """What the programs report is the version that was installed."""
    assert fl_shared.__version__ == importlib.metadata.version("concordat-fl")


def test_the_version_is_written_in_one_place() -> None:
    """Nothing that is built or shipped has a copy of it that could lag behind."""
    written = f'"{fl_shared.__version__}"'
    shipped = [each for room in ("shared", "server", "client") for each in (ROOT / room).rglob("*.py")]
    holding = [each for each in (*shipped, ROOT / "pyproject.toml") if written in each.read_text("utf-8")]
    assert holding == [ROOT / "shared" / "fl_shared" / "__init__.py"]


def test_importing_the_core_is_light() -> None:
    """The core modules import neither torch nor Flower nor SQL, so that every command starts fast."""
    modules = (
        "errors canonical names fields declaration identity.signing privacy.mechanism adapters.safetensors "
        "documents.round wire.chunks wire.agent_pb2_grpc"
    )
    source = f"import sys; [__import__('fl_shared.' + m) for m in '{modules}'.split()]; print(*sys.modules)"
    loaded = subprocess.run(
        [sys.executable, "-c", source], capture_output=True, text=True, check=True, timeout=60
    ).stdout.split()
    assert not {"torch", "flwr", "transformers", "peft", "opacus", "sqlalchemy", "dp_accounting"} & set(loaded)
