"""Pretrain the small DeepSeek-V3-style MoE of `tiny`, with a router balanced without an auxiliary loss.

The router is balanced as in DeepSeek-V3 (arXiv 2412.19437, section 2.1.2): its selection bias moves against each
expert's load after every step (Wang et al. 2024, arXiv 2408.15664), beside a sequence-wise balance loss. The text is
public; private fine-tuning knows neither, for both couple examples.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from fl_client.model.recipe.corpus import find_wordnet, icd_lines, wordnet_glosses
from fl_shared.cli.output import Say, silent

VOCABULARY = 6144
MAX_TOKENS = 40
BATCH_TOKENS = 2048
BALANCE_RATE = 2e-3
BALANCE_LOSS = 1e-2
PAD, BOS, EOS = "<pad>", "<s>", "</s>"


def configuration() -> DeepseekV3Config:
    """DeepSeek-V3 in small: 4 layers, the first dense, then 16 routed experts (top-2) and 1 shared."""
    return DeepseekV3Config(
        vocab_size=VOCABULARY,
        hidden_size=256,
        intermediate_size=512,
        moe_intermediate_size=128,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_shared_experts=1,
        n_routed_experts=16,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        first_k_dense_replace=1,
        routed_scaling_factor=1.0,
        norm_topk_prob=True,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def train_tokenizer(lines: list[str]) -> PreTrainedTokenizerFast:
    """Lower-cased byte-level BPE over the corpus: no text is out of vocabulary. Every text begins with BOS."""
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=True)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, tokenizer.token_to_id(BOS))]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS)


def _batches(sequences: list[list[int]], seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless (input ids, mask) of about BATCH_TOKENS tokens, sequences of like length together."""
    chance = random.Random(seed)  # noqa: S311  # shuffles public text
    while True:
        order = sorted(range(len(sequences)), key=lambda i: (len(sequences[i]), chance.random()))
        groups: list[list[int]] = [[]]
        for index in order:
            if groups[-1] and (len(groups[-1]) + 1) * len(sequences[index]) > BATCH_TOKENS:
                groups.append([])
            groups[-1].append(index)
        chance.shuffle(groups)
        for group in groups:
            width = max(len(sequences[i]) for i in group)
            ids = torch.zeros(len(group), width, dtype=torch.long)
            mask = torch.zeros(len(group), width, dtype=torch.long)
            for row, index in enumerate(group):
                ids[row, : len(sequences[index])] = torch.tensor(sequences[index])
                mask[row, : len(sequences[index])] = 1
            yield ids, mask


class RouterLoad:
    """Counts each expert's real tokens in every layer of a causal LM while it is open (a context manager)."""

    def __init__(self, model: nn.Module) -> None:
        self.gates: list[Any] = [module for module in model.modules() if hasattr(module, "e_score_correction_bias")]
        self.loads = [torch.zeros(gate.num_experts) for gate in self.gates]
        self._mask = torch.ones(1, 1)
        self._balance: list[Tensor] = []
        self._hooks = [gate.register_forward_hook(self._count(i)) for i, gate in enumerate(self.gates)]
        self._hooks.append(model.get_submodule("model").register_forward_pre_hook(self._begin, with_kwargs=True))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def _begin(self, _module: nn.Module, _inputs: Any, named: dict[str, Any]) -> None:
        mask = named.get("attention_mask")
        self._mask = torch.ones_like(named["input_ids"]).float() if mask is None else mask.float()
        self._balance.clear()

    def _count(self, index: int) -> Any:
        def hook(gate: Any, _inputs: Any, output: Any) -> None:
            logits, _, chosen = output
            rows, width = self._mask.shape
            chose = torch.zeros_like(logits).scatter_(1, chosen, 1.0).view(rows, width, -1) * self._mask.unsqueeze(-1)
            self.loads[index] += chose.detach().sum((0, 1))
            if torch.is_grad_enabled():
                tokens = self._mask.sum(1, keepdim=True)
                scores = logits.sigmoid().view(rows, width, -1)
                shares = scores / scores.sum(-1, keepdim=True) * self._mask.unsqueeze(-1)
                often = chose.sum(1) * gate.num_experts / (gate.top_k * tokens)
                self._balance.append((often * shares.sum(1) / tokens).sum(1).mean())

        return hook

    def balance_loss(self) -> Tensor:
        """DeepSeek-V3's sequence-wise balance loss of the last forward pass, mean over layers (equations 17 to 20)."""
        return torch.stack(self._balance).mean()

    @torch.no_grad()
    def rebalance(self, rate: float) -> None:
        """Move every selection bias one sign step against the load; the counts start again."""
        for gate, load in zip(self.gates, self.loads, strict=True):
            gate.e_score_correction_bias += rate * torch.sign(load.mean() - load)
            load.zero_()

    def shares(self) -> list[list[float]]:
        """Each layer's expert loads over the even share."""
        return [(load / load.mean()).tolist() for load in self.loads]


def pretrain(
    out: Path, *, steps: int, wordnet: Path | None, seed: int = 0, checkpoint: int = 500, say: Say = silent
) -> dict[str, Any]:
    """Build corpus, tokenizer and model; train; write a Hugging Face directory at `out`.

    Returns:
        What the report says of the training: corpus counts, steps, last loss.
    """
    torch.manual_seed(seed)
    say("reading the corpus and training the tokenizer")
    glosses, codes = wordnet_glosses(find_wordnet(wordnet)), icd_lines(seed)
    tokenizer = train_tokenizer(glosses + 4 * codes)
    # Descriptions alone too, as a site's records are: the router has to be balanced on them as well.
    texts = glosses + 5 * codes + 5 * [code.partition(": ")[0] for code in codes]
    sequences = [[*ids[: MAX_TOKENS - 1], tokenizer.eos_token_id] for ids in tokenizer(texts)["input_ids"]]
    model = DeepseekV3ForCausalLM(configuration())
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "e_score_correction_bias"):
                module.weight.normal_(0.0, 0.02)
    model.set_experts_implementation("grouped_mm")
    balance = RouterLoad(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.95), weight_decay=0.05)
    peak, warm = 3e-3, min(100, steps // 10 + 1)
    batches = _batches(sequences, seed)
    loss_mean = 0.0
    out.mkdir(parents=True, exist_ok=True)
    for step in range(1, steps + 1):
        rate = peak * min(step / warm, 1.0) * max(0.03, 1.0 - max(0, step - warm) / (steps - warm + 1))
        for group in optimizer.param_groups:
            group["lr"] = rate
        ids, mask = next(batches)
        keep = mask[:, 1:].bool()
        with torch.autocast("cpu", torch.bfloat16):
            hidden = model.model(input_ids=ids, attention_mask=mask).last_hidden_state
            logits = model.lm_head(hidden[:, :-1][keep])
        loss = F.cross_entropy(logits.float(), ids[:, 1:][keep])
        optimizer.zero_grad(set_to_none=True)
        (loss + BALANCE_LOSS * balance.balance_loss()).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        balance.rebalance(BALANCE_RATE * min(1.0, 0.05 + 2 * (1 - step / steps)))
        loss_mean = 0.98 * loss_mean + 0.02 * loss.item() if step > 1 else loss.item()
        say("pretraining", step, steps)
        if step % checkpoint == 0 or step == steps:
            model.save_pretrained(out)
            tokenizer.save_pretrained(out)
    return {
        "seed": seed,
        "steps": steps,
        "loss": round(loss_mean, 4),
        "wordnet_glosses": len(glosses),
        "icd_descriptions": len(codes),
    }
