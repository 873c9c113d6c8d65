"""The start of a round: a frozen base with its adapter at the run's seeded start plus what was learned so far."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from numpy.typing import NDArray

from fl_client.dp.adapt import AdaptedModel, adapt
from fl_client.dp.initial import initial_tensors
from fl_client.dp.objective import Objective
from fl_client.model.load import LoadedModel
from fl_shared.adapters.safetensors import Tensors
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConfigError


def adapted_for(model: LoadedModel, spec: RunSpec, objective: Objective) -> AdaptedModel:
    """The model as the spec wants it adapted, with the objective's head; EngineError as `adapt`."""
    core = spec.run.aggregation == "fed-sb"
    return adapt(model.module, spec.lora, objective, model.feature_mean, model.feature_std, core=core)


def frozen_tensors(adapted: AdaptedModel, spec: RunSpec) -> frozenset[str]:
    """Trainable tensors that the run's aggregator keeps at their seeded start; they are in no update."""
    factors = {"ffa": (".lora_A",), "fed-sb": (".lora_A", ".lora_B")}.get(spec.run.aggregation, ())
    return frozenset(name for name in adapted.trainable if any(factor in name for factor in factors))


def load_offset(adapted: AdaptedModel, spec: RunSpec, offset: Mapping[str, NDArray[np.float32]]) -> Tensors:
    """Put seeded start + offset into the model, and return it.

    Raises ConfigError when names or shapes differ, or the offset names a tensor that stays at its start.
    """
    start = initial_tensors(adapted, spec.training.seed_adapter)
    moving = start.keys() - frozen_tensors(adapted, spec)
    for name, value in offset.items():
        if name not in moving or start[name].shape != value.shape:
            raise ConfigError(
                f"the adapter's tensor {name!r} {list(value.shape)} does not belong to this model and spec",
                fix="check that coordinator and site use the same base model and run spec",
            )
        start[name] = start[name] + value.astype(np.float32)
    with torch.no_grad():
        for name, parameter in adapted.trainable.items():
            parameter.copy_(torch.from_numpy(start[name]))
    return start
