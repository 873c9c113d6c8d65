"""The public start of a run: every site makes the same adapter from the run's seed, without sending it."""

from __future__ import annotations

import hashlib
import math

import numpy as np
from numpy.typing import NDArray
from torch import nn

from fl_client.dp.adapt import AdaptedModel
from fl_shared.adapters.safetensors import Tensors


def initial_tensors(adapted: AdaptedModel, seed: int) -> Tensors:
    """Factor A uniform in +-1/sqrt(in), factor B and the head zero: the adapted model equals the base.

    With cores, A and B are uniform in +-sqrt(3/in) and +-sqrt(3/out), so that A's rows and B's columns have about unit
    length, and the cores are zero.

    The numbers come from PCG64 (O'Neill 2014), seeded by `SeedSequence([seed, SHA-256 of the tensor's name])`; the
    upper 53 bits of each raw word give one number. Raw words, unlike numpy's distributions, are the same in every
    release (NEP 19).
    """
    return {name: _start(name, parameter, seed, core=adapted.core) for name, parameter in adapted.trainable.items()}


def _start(name: str, parameter: nn.Parameter, seed: int, *, core: bool) -> NDArray[np.float32]:
    shape = tuple(parameter.shape)
    if ".lora_A" not in name and not (core and ".lora_B" in name):
        return np.zeros(shape, dtype=np.float32)
    digest = hashlib.sha256(name.encode()).digest()
    words = [int.from_bytes(digest[at : at + 4], "big") for at in range(0, 32, 4)]
    bits = np.random.PCG64(np.random.SeedSequence([seed, *words])).random_raw(math.prod(shape))
    unit = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
    bound = math.sqrt(3.0 / shape[-2 if ".lora_B" in name else -1]) if core else 1.0 / math.sqrt(shape[-1])
    return ((2.0 * unit - 1.0) * bound).astype(np.float32).reshape(shape)
