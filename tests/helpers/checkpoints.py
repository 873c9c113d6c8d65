"""Copies of a model directory with something changed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]


def altered(good: Path, target: Path, change: Callable[[Tensors], Tensors], **config: object) -> Path:
    """A copy of a directory with other tensors and other fields in config.json (None takes a field out)."""
    shutil.copytree(good, target)
    save_file(
        {name: value.contiguous() for name, value in change(load_file(good / "model.safetensors")).items()},
        target / "model.safetensors",
    )
    path = target / "config.json"
    fields = {**json.loads(path.read_text()), **config}
    path.write_text(json.dumps({name: value for name, value in fields.items() if value is not None}))
    return target
