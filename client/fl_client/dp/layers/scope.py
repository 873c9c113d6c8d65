"""What the LoRA layers must know about the micro-batch that passes through them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from fl_client.dp.layers.book import GradientBook
from fl_client.dp.records.packing import Packed

Mode = Literal["plain", "book", "hooks"]


@dataclass
class BatchScope:
    """Shared by all layers of one adapted model.

    Attributes:
        mode: `plain` lets autograd sum over the batch (evaluation, non-private training, the batch-size-1 oracle);
            `book` writes to the book instead; `hooks` calls each factor as a module, so that Opacus' hooks see it.
        book: the open book in mode `book`.
        packed: the micro-batch, when it is a packed one.
        kept: positions of the real tokens among all B * T of a padded one; None when none is padding. Experts pass the
            others by.
        records, tokens: B and T of the micro-batch in mode `hooks`.
        unit_anchor: `[B, 0]` in mode `hooks`: Opacus reads the batch size from the last argument of a layer.
    """

    mode: Mode = "plain"
    book: GradientBook | None = None
    packed: Packed | None = None
    kept: Tensor | None = None
    records: int = 0
    tokens: int = 0
    unit_anchor: Tensor | None = None
