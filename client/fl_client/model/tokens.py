"""Texts as token ids of a model's tokenizer, cut at a task's length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_ids(texts: Sequence[str], tokenizer: Any, max_tokens: int) -> tuple[tuple[tuple[int, ...], ...], int]:
    """Ids of each text, cut at `max_tokens`, and how many were cut. A text without tokens becomes one pad token."""
    if not texts:
        return (), 0
    cut = tokenizer(list(texts), truncation=True, max_length=max_tokens)["input_ids"]
    long = tokenizer(list(texts), truncation=True, max_length=max_tokens + 1)["input_ids"]
    truncated = sum(len(row) > max_tokens for row in long)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return tuple(tuple(row) if row else (pad,) for row in cut), truncated
