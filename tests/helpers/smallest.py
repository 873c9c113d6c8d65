"""The smallest base a site can train: a quantised DeepSeek-V3 of one layer with random weights, for tests of processes.

What these tests are about (locks, kills, ledgers, orders) does not depend on the size of the base, and what a site
tries on its base before it is ready, and before a run's first round, takes a tenth of the time that it takes on `tiny`.
"""

from __future__ import annotations

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

from transformers import DeepseekV3Config

from fl_client.model.layout import directory_digest
from fl_client.model.load import TINY
from fl_client.model.quantise import quantise_directory
from helpers.random_models import float_model

TOKENIZER = ("tokenizer.json", "tokenizer_config.json")


@functools.cache
def smallest_base() -> Path:
    """Its directory, made once in a process, and gone with it. Any user may read it."""
    root = Path(tempfile.mkdtemp(prefix="base-"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    config = DeepseekV3Config(
        vocab_size=6144, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        intermediate_size=16, moe_intermediate_size=16, n_shared_experts=1, n_routed_experts=2, num_experts_per_tok=1,
        first_k_dense_replace=0, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8, q_lora_rank=None,
        n_group=1, topk_group=1, max_position_embeddings=512, initializer_range=0.15, tie_word_embeddings=True,
    )  # fmt: skip
    float_model(config).save_pretrained(root / "float")  # type: ignore[operator]  # a PreTrainedModel
    for name in TOKENIZER:
        shutil.copy(Path(TINY) / name, root / "float")
    quantise_directory(root / "float", root / "smallest")
    for path in (root, *root.rglob("*")):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return root / "smallest"


@functools.cache
def smallest_digest() -> str:
    """Its digest, as a spec names it."""
    return directory_digest(smallest_base())
