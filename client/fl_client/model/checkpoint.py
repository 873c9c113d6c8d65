"""Check that a directory is the float model of its config.json: its weights, scales and tokenizer.

Files decide, not the config: one whose weights are float is used whatever its `quantization_config` says, and one with
a quantised tensor is refused by name, for its scales would be dropped and the result be another model. float8 with
block scales (DeepSeek-V3's release) is the one form that is read: its values are products of two floats.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from fl_client.model.layout import OUTPUT_HEAD, TOKENIZER_FILES, Stored, read_config, stored_tensors, unreadable
from fl_shared.errors import ModelError

_FLOATS = ("F32", "BF16", "F16", "F64")
_WHOLE = {torch.int8: ("I8",), torch.uint8: ("U8",), torch.int64: ("I64",)}
_SCHEMES = (  # ends of tensor names, and who writes them; the first that fits
    ((".SCB", ".absmax", ".quant_map", ".weight_format", ".nested_absmax", ".nested_quant_map"), "bitsandbytes"),
    ((".W_q",), "HQQ"),
    ((".codebooks",), "AQLM"),
    ((".Qidxs",), "QuIP#"),
    ((".centroids.weight", ".centroids"), "VPTQ"),
    ((".trellis",), "EXL3"),
    ((".q_invperm",), "EXL2"),
    ((".weight_scale_2",), "ModelOpt"),
    ((".weight_scales",), "EETQ"),
    ((".weight_packed", ".weight_scale", ".weight_zero_point", ".weight_shape", ".weight_g_idx"), "compressed-tensors"),
    ((".biases",), "MLX"),
    ((".qweight", ".qzeros", ".scales", ".g_idx"), "GPTQ or AWQ"),
    (("_blocks", "_scales"), "MXFP4"),
    (("_scale_inv",), "float8"),
    ((":_data", ":_qdata", "._data", "_scale", "_zero_point"), "torchao or quanto"),
)
_LAYER = re.compile(r"((?:model\.)?layers\.(\d{1,6})\.)")
_SLOW_FILES = ("vocab.json", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "tekken.json")
_PROBE = "The patient has had a cough for 14 days."


def float_tensors(directory: Path, model: nn.Module) -> list[Stored]:
    """The tensors on disk that make `model` (a skeleton), each once: what is left over is none of the model's.

    A head that is tied to the embeddings is left out. Tensors that transformers leaves out of this family, layers past
    the last that predict several tokens, and rotary frequencies are left over without a word.

    Raises:
        ModelError: a tensor is missing, not float, of another shape than config.json says, or of no use to the model,
            so that another model was meant.
    """
    config = read_config(directory)
    expected = dict(model.state_dict())
    stored = {tensor.name: tensor for tensor in stored_tensors(directory)}
    head, embeddings = f"{OUTPUT_HEAD}.weight", "model.embed_tokens.weight"
    tied = ties_head(model)
    extra = sorted(stored.keys() - expected.keys() - _ignored(stored.keys(), model))
    for name, tensor in stored.items():
        odd = [piece for piece in tensor.pieces if piece.dtype not in _FLOATS and piece.scale is None]
        if name in expected and expected[name].is_floating_point() and odd:
            raise _quantised(directory, config, f"{odd[0].name} is stored as {odd[0].dtype}", extra)
    if extra:
        whole = any(piece.dtype not in _FLOATS for name in extra for piece in stored[name].pieces)
        if _scheme(extra) or whole or "quantization_config" in config:
            raise _quantised(directory, config, f"it holds {extra[0]}", extra)
        raise ModelError(
            f"{directory}: a {config['model_type']} model of this config.json has no {extra[0]} ({len(extra)} in all)",
            fix="take config.json and weights from the same release",
        )
    missing = sorted(expected.keys() - stored.keys() - ({head} if tied else set()))
    if missing:
        raise ModelError(f"{directory} lacks {missing[0]} ({len(missing)} in all)", fix="copy the model again, whole")
    for name, tensor in stored.items():
        if name in expected and (mismatch := tensor.misshapen(tuple(expected[name].shape))):
            raise ModelError(f"{directory}: {mismatch}", fix="take config.json and weights from the same release")
    if tied and head in stored:
        own, shared = stored.pop(head), stored[embeddings]
        if not torch.equal(*(next(tensor.read(by_expert=False)).float() for tensor in (own, shared))):
            raise ModelError(
                f"{directory}: {head} differs from the embeddings that config.json ties it to",
                fix='write "tie_word_embeddings": false into config.json if the model has a head of its own',
            )
    return [tensor for name, tensor in stored.items() if name in expected]


def require_quantised(directory: Path, model: nn.Module) -> None:
    """ModelError unless the files hold the tensors of `model` (a skeleton with quantised layers) and no other."""
    expected = dict(model.state_dict())
    if ties_head(model):
        expected.pop(f"{OUTPUT_HEAD}.weight", None)
    stored = {tensor.name: tensor.pieces[0] for tensor in stored_tensors(directory)}
    odd = sorted(stored.keys() ^ expected.keys())
    if odd:
        raise ModelError(
            f"{directory}: weights and config differ at {odd[0]} ({len(odd)} in all)", fix="quantise the model again"
        )
    for name, parameter in expected.items():
        piece = stored[name]
        kinds = _FLOATS if parameter.is_floating_point() else _WHOLE[parameter.dtype]
        if piece.shape != tuple(parameter.shape) or piece.dtype not in kinds:
            raise ModelError(
                f"{directory}: {name} is {piece.dtype} {piece.shape}, config.json says {kinds[0]} "
                f"{tuple(parameter.shape)}",
                fix="quantise the model again",
            )


def ties_head(model: nn.Module) -> bool:
    """Whether the head is the embeddings' matrix: the family's default where config.json says nothing."""
    config: Any = model.config
    return bool(config.tie_word_embeddings)


def _ignored(names: Iterable[str], model: nn.Module) -> set[str]:
    """Those that no text model of this family needs. A layer past the last predicts more tokens if it has `eh_proj`."""
    config: Any = model.config
    patterns = getattr(model, "_keys_to_ignore_on_load_unexpected", None) or ()
    layers = {name: match for name in names if (match := _LAYER.match(name))}
    beyond = {match[1] for match in layers.values() if int(match[2]) >= int(config.num_hidden_layers)}
    extra = {layer for layer in beyond if any(name.startswith(f"{layer}eh_proj.") for name in layers)}
    return {
        name
        for name in names
        if name.endswith(("rotary_emb.inv_freq", ".masked_bias"))
        or (name in layers and layers[name][1] in extra)
        or any(re.search(pattern, name) for pattern in patterns)
    }


def _scheme(names: list[str]) -> str:
    """Who writes tensors of such names; nothing when nobody known does."""
    for ends, scheme in _SCHEMES:
        if any(name.endswith(ends) or ".quant_state." in name for name in names):
            return scheme
    return ""


def _quantised(directory: Path, config: dict[str, Any], sign: str, names: list[str]) -> ModelError:
    settings = config.get("quantization_config")
    method = settings.get("quant_method") if isinstance(settings, dict) else None
    scheme = method if isinstance(method, str) else _scheme(names) or "a scheme that is not known here"
    return ModelError(
        f"{directory} is already quantised ({scheme}): {sign}",
        fix="get the model's float release (bfloat16 or float32) and quantise that: the values between are lost here",
    )


def load_tokenizer(directory: Path, rows: int) -> PreTrainedTokenizerFast:
    """The directory's tokenizer.json, for embeddings of so many `rows`.

    Raises:
        ModelError: there is none, it or a file beside it is broken, it has ids that the embeddings have not, or reads
            every text as unknown.
    """
    if not (directory / "tokenizer.json").is_file():
        raise ModelError(f"{directory}: tokenizer.json is not there", fix="copy the tokenizer beside the weights")
    for name in TOKENIZER_FILES:
        if (directory / name).is_file():
            _require_json(directory / name)
    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)
        understands = _tells_apart(tokenizer)
    except Exception as error:  # tokenizers raises bare Exception for a file that it cannot read
        raise ModelError(
            f"{directory}: tokenizer.json is broken: {_reason(error)}", fix="copy the tokenizer beside the weights"
        ) from error
    if not understands:
        raise ModelError(
            f"{directory}: tokenizer.json reads every text as unknown", fix="copy the tokenizer of the same model"
        )
    return _with_ids_below(rows, tokenizer, directory)


def _with_ids_below(rows: int, tokenizer: PreTrainedTokenizerFast, directory: Path) -> PreTrainedTokenizerFast:
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ModelError(
            f"{directory}: the tokenizer knows ids up to {highest}, the model {rows} tokens",
            fix="copy tokenizer and weights from the same model",
        )
    return tokenizer


def _require_json(path: Path) -> None:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, "JSON", error) from error
    if not isinstance(table, dict):
        raise unreadable(path, "JSON", "it holds no table")


def _tells_apart(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Whether the probe becomes tokens of its own, and not unknown ones or those that every text gets."""
    ids = tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
    return len(set(ids) - {*tokenizer.all_special_ids, tokenizer.unk_token_id}) > 1


def _reason(error: Exception) -> str:
    """The first line of an error of the tokenizers' library."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)[:200]


def fast_tokenizer(directory: Path, rows: int) -> tuple[PreTrainedTokenizerFast, bool]:
    """The tokenizer, and whether it had to be made from a slow one's files; `rows` are the embeddings'.

    Raises:
        ModelError: as `load_tokenizer`, and when it cannot be converted here.
    """
    if (directory / "tokenizer.json").is_file():
        return load_tokenizer(directory, rows), False
    return _with_ids_below(rows, _converted(directory), directory), True


def _converted(directory: Path) -> PreTrainedTokenizerFast:
    slow = sorted(path.name for path in directory.iterdir() if path.name in _SLOW_FILES or path.suffix == ".tiktoken")
    if not slow:
        raise ModelError(f"{directory} holds no tokenizer", fix="copy tokenizer.json beside the weights")
    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True, trust_remote_code=False)
        usable = isinstance(tokenizer, PreTrainedTokenizerFast) and _tells_apart(tokenizer)
        why = "it reads every text as unknown"
    except Exception as error:  # noqa: BLE001  # each family's converter fails in its own way; all mean the same here
        usable, why = False, _reason(error)
    if not usable:
        raise ModelError(
            f"{directory}: {slow[0]} is a slow tokenizer, and making tokenizer.json of it failed: {why}",
            fix="copy tokenizer.json from the release, or make it where sentencepiece and tiktoken are installed "
            "(AutoTokenizer.from_pretrained(...).save_pretrained(...))",
        )
    return tokenizer
