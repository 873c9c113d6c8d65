"""Write the app's folder for `flwr run`. Its content is the same for every run, so its hash is, too."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from fl_shared import __version__
from fl_shared.files import write_durably

FOLDER = "concordat_app"
_PYPROJECT = f"""[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"

[project]
name = "concordat-app"
version = "{__version__}"
description = "Forwards rounds between a coordinator and its sites"
license = "Apache-2.0"
requires-python = ">=3.11"
dependencies = ["flwr==1.41.0"]

[tool.hatch.build.targets.wheel]
packages = ["."]

[tool.flwr.app]
publisher = "concordat"
flwr-version-target = "1.41.0"
fab-include = ["{FOLDER}/*.py"]

[tool.flwr.app.components]
serverapp = "{FOLDER}.server_app:app"
clientapp = "{FOLDER}.client_app:app"

[tool.flwr.app.config]
run = ""
attempt = ""
home = ""
"""


def write_app(target: Path) -> Path:
    """Write the app below `target` and return its folder."""
    source = resources.files("fl_server.rounds.app")
    write_durably(target / "pyproject.toml", _PYPROJECT.encode())
    for name in ("__init__.py", "agent_pb2.py", "client_app.py", "relay.py", "server_app.py"):
        write_durably(target / FOLDER / name, (source / name).read_bytes(), mode=0o644)
    return target
