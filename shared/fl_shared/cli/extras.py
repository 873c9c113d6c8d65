"""Which extra of the distribution brings an optional package, and what a person types when one is missing.

The auditor's install is the bare distribution; a coordinator's, a site's and a report's packages come with extras.
"""

from __future__ import annotations

import importlib.util
import shlex
import sys

from fl_shared.errors import ConfigError

DISTRIBUTION = "concordat-fl"

EXTRAS: dict[str, tuple[str, ...]] = {
    "server": ("flwr", "httpx", "prometheus_client", "starlette", "structlog", "uvicorn"),
    "client": (
        "flwr", "httpx", "opacus", "peft", "prometheus_client", "safetensors", "starlette", "structlog",
        "tokenizers", "torch", "transformers", "uvicorn",
    ),
    "gpu": ("pynvml",),
    "postgres": ("psycopg",),
    "report": ("fpdf", "jinja2", "matplotlib"),
    "demo": ("simple_icd_10_cm",),
}  # fmt: skip
"""Extra: the modules that it brings, by the names under which they are imported."""

_OURS = ("fl_shared", "fl_server", "fl_client")


def install_command(extra: str = "") -> str:
    """The shell command that adds `extra` to this very environment; what is installed already is kept as it is."""
    requirement = f"{DISTRIBUTION}[{extra}]" if extra else DISTRIBUTION
    return f"{shlex.quote(sys.executable)} -m pip install {shlex.quote(requirement)}"


def extra_of(module: str, ours: str) -> str:
    """The extra that brings `module`, for code in our package `ours`: where several do, the one of that package."""
    likely = {"fl_server": "server", "fl_client": "client"}.get(ours, "")
    bringing = [extra for extra, modules in EXTRAS.items() if module in modules]
    return likely if likely in bringing or not bringing else bringing[0]


def missing_package(error: ImportError, ours: str) -> ConfigError | None:
    """What to tell a person about an import that failed in our package `ours`; None when the module is our own."""
    module = (error.name or "").partition(".")[0]
    if module in _OURS or module in sys.stdlib_module_names:
        return None
    extra = extra_of(module, ours)
    whose = f"the extra {extra!r}" if extra else f"what {DISTRIBUTION} needs"
    if isinstance(error, ModuleNotFoundError):
        message = f"the package {module} is not installed; it takes {whose}"
    else:  # an older version, or a library of the system that it needs
        message = f"the package {module or '(unnamed)'} cannot be used: {error}; it takes {whose}"
    return ConfigError(message, fix=install_command(extra), code="missing-package")


def require(extra: str) -> None:
    """ConfigError naming what is missing of an extra, before anything is started that would need it later."""
    absent = [module for module in EXTRAS[extra] if importlib.util.find_spec(module) is None]
    if absent:
        packages = f"package {absent[0]} is" if len(absent) == 1 else f"packages {', '.join(absent)} are"
        raise ConfigError(
            f"the {packages} not installed; it takes the extra {extra!r}",
            fix=install_command(extra), code="missing-package",
        )  # fmt: skip
