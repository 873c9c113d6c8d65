"""Training without privacy, for data that a site's policy declares public. Loud, and never the default."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import torch

from fl_client.dp.adapt import AdaptedModel
from fl_client.dp.mechanism.sampling import PoissonSampler
from fl_client.dp.mechanism.secure_random import SecureStream
from fl_client.dp.objective import losses_of
from fl_client.dp.records.records import Records, micro_batches
from fl_shared.documents.spec import RunSpec
from fl_shared.privacy.mechanism import Mechanism

log = logging.getLogger("fl_client.dp")


def train_public(
    adapted: AdaptedModel,
    records: Records,
    mechanism: Mechanism,
    spec: RunSpec,
    *,
    frozen: frozenset[str] = frozenset(),
    progress: Callable[..., None] | None = None,
) -> Mechanism:
    """The same sampling and optimizer as the private engine, without clipping and noise.

    Returns:
        The steps taken. The mechanism does not describe a private release; it must not be reported as one.
    """
    log.warning("TRAINING WITHOUT PRIVACY: the site's policy declares this data public; no noise, no clipping")
    for name, parameter in adapted.trainable.items():
        parameter.requires_grad_(name not in frozen)
    trained = {name: p for name, p in adapted.trainable.items() if name not in frozen}
    rate = {True: spec.training.head_learning_rate, False: spec.training.learning_rate}
    optimizer = torch.optim.SGD(
        [{"params": [p], "lr": rate[adapted.groups[name] == "head"]} for name, p in trained.items()],
        momentum=spec.training.momentum,
    )
    device = next(iter(adapted.trainable.values())).device
    expected = mechanism.sampling_probability * records.units
    sampler = PoissonSampler(records.units, mechanism.sampling_probability, mechanism.steps, SecureStream())
    adapted.module.train()
    try:
        for number, units in enumerate(sampler, start=1):
            optimizer.zero_grad(set_to_none=True)
            for batch in micro_batches(records, units, device):
                loss = losses_of(adapted.objective, adapted.module(batch.ids, batch.mask), batch.targets)
                (loss.sum() / expected).backward()
            optimizer.step()
            if progress is not None:
                progress(step=number, steps=mechanism.steps)
    finally:
        adapted.module.eval()
    return dataclasses.replace(mechanism)
