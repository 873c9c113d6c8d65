"""Is a directory the float model that its config.json says it is? Weights, scales and tokenizer are looked at first.

Files decide, not the config: one whose weights are float is used whatever its `quantization_config` says, and one with
a quantised tensor is refused by name, for its scales would be dropped and the result be another model. float8 with
block scales (DeepSeek-V3's release) is the one form that is read: its values are products of two floats.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fl_client.model.layout import OUTPUT_HEAD, Stored, read_config, stored_tensors
from fl_shared.errors import ModelError

_FLOATS = ("F16", "BF16", "F32", "F64")
_SCHEMES = (  # ends of tensor names, and who writes them
    ((".SCB", ".absmax", ".quant_map", ".weight_format", ".nested_absmax", ".nested_quant_map"), "bitsandbytes"),
    ((".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"), "compressed-tensors"),
    ((".qweight", ".qzeros", ".scales", ".g_idx"), "GPTQ or AWQ"),
    (("_blocks", "_scales"), "MXFP4"),
    (("_scale_inv",), "float8"),
    ((":_data", ":_qdata", "._data", "_scale", "_zero_point"), "torchao or quanto"),
)
_LAYER = re.compile(r"(?:model\.)?layers\.(\d{1,6})\.")
_SLOW_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
_PROBE = "The patient has had a cough for 14 days."


def float_tensors(directory: Path, model: nn.Module) -> list[Stored]:
    """The tensors on disk that make `model` (a skeleton), each once: what is left over is none of the model's.

    A head that is tied to the embeddings is left out. Tensors that transformers leaves out of this family, layers past
    the last (multi-token prediction) and rotary frequencies are left over without a word.

    Raises:
        ModelError: a tensor is missing, not float, or of no use to the model, so that another model was meant.
    """
    config = read_config(directory)
    expected = dict(model.state_dict())
    stored = {each.name: each for each in stored_tensors(directory)}
    head, embeddings = f"{OUTPUT_HEAD}.weight", "model.embed_tokens.weight"
    tied = ties_head(model)
    left = sorted(name for name in stored.keys() - expected.keys() if not _ignored(name, model))
    for name, each in stored.items():
        odd = [piece for piece in each.pieces if piece.dtype not in _FLOATS and piece.scale is None]
        if name in expected and expected[name].is_floating_point() and odd:
            raise _quantised(directory, config, f"{odd[0].name} is stored as {odd[0].dtype}", left)
    if left:
        if (scheme := _scheme(left)) or "quantization_config" in config:
            raise _quantised(directory, config, f"it holds {left[0]}", left if scheme else [])
        raise ModelError(
            f"{directory}: a {config['model_type']} model of this config.json has no {left[0]} ({len(left)} in all)",
            fix="take config.json and weights from the same release",
        )
    missing = sorted(expected.keys() - stored.keys() - ({head} if tied else set()))
    if missing:
        raise ModelError(f"{directory} lacks {missing[0]} ({len(missing)} in all)", fix="copy the model again, whole")
    if tied and head in stored:
        own, shared = stored.pop(head), stored[embeddings]
        if not torch.equal(*(next(each.read(by_expert=False)).float() for each in (own, shared))):
            raise ModelError(
                f"{directory}: {head} differs from the embeddings that config.json ties it to",
                fix='write "tie_word_embeddings": false into config.json if the model has a head of its own',
            )
    return [each for name, each in stored.items() if name in expected]


def ties_head(model: nn.Module) -> bool:
    """Whether the head is the embeddings' matrix: the family's default where config.json says nothing."""
    config: Any = model.config
    return bool(config.tie_word_embeddings)


def _ignored(name: str, model: nn.Module) -> bool:
    config: Any = model.config
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    layer = _LAYER.match(name)
    return (
        name.endswith(("rotary_emb.inv_freq", ".masked_bias"))
        or (layer is not None and int(layer.group(1)) >= int(config.num_hidden_layers))
        or any(re.search(pattern, name) for pattern in patterns)
    )


def _scheme(names: list[str]) -> str:
    """Who writes tensors of such names; nothing when nobody known does."""
    for ends, scheme in _SCHEMES:
        if any(name.endswith(ends) or ".quant_state." in name for name in names):
            return scheme
    return ""


def _quantised(directory: Path, config: dict[str, Any], sign: str, names: list[str]) -> ModelError:
    settings = config.get("quantization_config")
    said = settings.get("quant_method") if isinstance(settings, dict) else None
    scheme = said if isinstance(said, str) else _scheme(names) or "a scheme that is not known here"
    return ModelError(
        f"{directory} is already quantised ({scheme}): {sign}",
        fix="get the model's float release (bfloat16 or float32) and quantise that: the values between are lost here",
    )


def load_tokenizer(directory: Path) -> PreTrainedTokenizerFast:
    """The directory's tokenizer.json; ModelError when there is none, or it is broken."""
    try:
        return PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        what = "is broken" if (directory / "tokenizer.json").is_file() else "is not there"
        raise ModelError(f"{directory}: tokenizer.json {what}", fix="copy the tokenizer beside the weights") from error


def fast_tokenizer(directory: Path, rows: int) -> tuple[PreTrainedTokenizerFast, bool]:
    """The tokenizer, and whether it had to be made from a slow one's files; `rows` are the embeddings'.

    Raises:
        ModelError: there is none, it cannot be converted here, or it has ids that the embeddings have not.
    """
    converted = not (directory / "tokenizer.json").is_file()
    tokenizer = _converted(directory) if converted else load_tokenizer(directory)
    if len(tokenizer) > rows:
        raise ModelError(
            f"{directory}: the tokenizer knows {len(tokenizer)} tokens, the model {rows}",
            fix="copy tokenizer and weights from the same model",
        )
    return tokenizer, converted


def _converted(directory: Path) -> PreTrainedTokenizerFast:
    slow = sorted(path.name for path in directory.iterdir() if path.name in _SLOW_FILES or path.suffix == ".tiktoken")
    if not slow:
        raise ModelError(f"{directory} holds no tokenizer", fix="copy tokenizer.json beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        ids = tokenizer(_PROBE)["input_ids"]
        usable = isinstance(tokenizer, PreTrainedTokenizerFast) and len(set(ids) - {tokenizer.unk_token_id}) > 1
        why = "it reads every text as unknown"
    except Exception as error:  # noqa: BLE001  # each family's converter fails in its own way; all mean the same here
        usable, why = False, str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    if not usable:
        raise ModelError(
            f"{directory}: {slow[0]} is a slow tokenizer, and making tokenizer.json of it failed: {why[:200]}",
            fix="copy tokenizer.json from the release, or make it where sentencepiece and tiktoken are installed "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        )
    return tokenizer
