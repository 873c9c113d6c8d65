"""The kinds of `[task]` that this site can do, by the name that a spec gives them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from fl_client.tasks.classification import Classification
from fl_client.tasks.task import Task
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError

KINDS: dict[str, Callable[[Any], Task]] = {"classification": Classification.of}
"""Kind to what makes the task from the spec's `[task]` section of that kind. A new kind is one file and one line."""


def task_of(spec: RunSpec) -> Task:
    """The run's task; ConfigError when this version has no such kind."""
    kind = spec.task.kind
    if kind not in KINDS:
        raise ConfigError(
            f"[task] kind is {kind!r}, and this version does {', '.join(sorted(KINDS))}",
            fix="install the version that the coordinator's administrator names",
        )
    return KINDS[kind](spec.task)
