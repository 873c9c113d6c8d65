"""Features of a base model: the mean over real tokens of its last hidden state."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from fl_client.model.load import LoadedModel
from fl_client.model.tokens import token_ids

MAX_TOKENS = 32


@torch.no_grad()
def pooled_features(model: LoadedModel, texts: Sequence[str], batch: int = 128) -> Tensor:
    """Mean over real tokens of the last hidden state: `[n, H]` float32, not standardised."""
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    out = torch.empty(len(texts), int(model.config["hidden_size"]))
    backbone = model.module.get_submodule("model")
    for start in range(0, len(order), batch):
        rows = order[start : start + batch]
        ids, _ = token_ids([texts[i] for i in rows], model.tokenizer, MAX_TOKENS)  # needs no token for padding
        mask = pad_sequence([torch.ones(len(row), dtype=torch.int64) for row in ids], batch_first=True).to(model.device)
        padded = pad_sequence([torch.tensor(row) for row in ids], batch_first=True).to(model.device)
        hidden = backbone(input_ids=padded, attention_mask=mask).last_hidden_state
        weight = mask.unsqueeze(-1).to(hidden.dtype)
        out[rows] = ((hidden * weight).sum(1) / weight.sum(1).clamp_min(1)).float().cpu()
    return out
