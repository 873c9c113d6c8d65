"""Offline mode: what libraries must be told so that no process looks up a name or dials out.

The same words for every process of coordinator and site, whoever starts it. `tests/operations` runs a whole
federation where each packet that leaves loopback is seen.
"""

from __future__ import annotations

import os

OFFLINE = {
    "FLWR_TELEMETRY_ENABLED": "0",  # Flower reports events
    "FLWR_DISABLE_UPDATE_CHECK": "1",  # Flower asks for its newest version
    "HF_HUB_OFFLINE": "1",  # transformers asks the hub even for a local directory
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
}
_NO_FORK_HANDLERS = {"GRPC_ENABLE_FORK_SUPPORT": "0"}
"""After a fork that fails (no more processes) gRPC's handlers end the process; ours only ever fork to run a program."""


def stay_offline() -> None:
    """Set all of it for this process and those that it starts; called before any of the libraries is imported."""
    os.environ.update(OFFLINE | _NO_FORK_HANDLERS)
