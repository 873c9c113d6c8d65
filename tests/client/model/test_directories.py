"""Model directories that are not what they seem are refused by name, and nothing is left behind."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast, Qwen3MoeConfig

from fl_client.model.features import pooled_features
from fl_client.model.inspect import inspect_directory
from fl_client.model.load import load_model
from fl_client.model.quantise import quantise_directory
from fl_shared.errors import ModelError
from helpers.checkpoints import Tensors, altered

Make = Callable[[str], tuple[PreTrainedModel, Path]]
IDS = torch.tensor([[5, 300, 17, 4, 260, 99]])


def _other_kind(kind: str, good: Path, target: Path) -> Path:
    shutil.copytree(good, target)
    weights, config = target / "model.safetensors", target / "config.json"
    index = target / "model.safetensors.index.json"
    names = list(load_file(weights))
    if kind == "an adapter":
        (target / "adapter_config.json").write_text('{"peft_type": "LORA"}')
        weights.rename(target / "adapter_model.safetensors")
    elif kind == "gguf":
        config.unlink()
        weights.rename(target / "model-q4_k_m.gguf")
    elif kind == "gguf beside a config":
        weights.rename(target / "model-q4_k_m.gguf")
    elif kind == "pickle":
        weights.rename(target / "pytorch_model.bin")
    elif kind == "a missing shard":
        weights.rename(target / "model-00001-of-00002.safetensors")
        there = dict.fromkeys(names, "model-00001-of-00002.safetensors")
        index.write_text(json.dumps({"weight_map": {**there, names[0]: "model-00002-of-00002.safetensors"}}))
    elif kind == "an index out of the folder":
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "../model.safetensors")}))
    elif kind == "a broken index":
        index.write_text("[]")
    elif kind == "two sets of weights":
        shutil.copyfile(weights, target / "model-00001-of-00001.safetensors")
        index.write_text(json.dumps({"weight_map": dict.fromkeys(names, "model-00001-of-00001.safetensors")}))
    elif kind == "a tensor twice":
        weights.rename(target / "a.safetensors")
        shutil.copyfile(target / "a.safetensors", target / "b.safetensors")
    elif kind == "a dangling link":
        weights.unlink()
        weights.symlink_to(target / "gone")
    elif kind == "a truncated file":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif kind == "a page of HTML":
        weights.write_bytes(b"<html>429 too many requests</html>")
    elif kind == "no tokenizer":
        (target / "tokenizer.json").unlink()
        (target / "tokenizer_config.json").unlink()
    elif kind == "a broken tokenizer":
        (target / "tokenizer.json").write_text("{}")
    elif kind == "a slow tokenizer":
        (target / "tokenizer.json").unlink()
        (target / "tokenizer.model").write_bytes(b"\x00not sentencepiece")
    return target


KINDS = {
    "an adapter": "LoRA adapter", "gguf": "GGUF", "gguf beside a config": "model-q4_k_m.gguf",
    "pickle": "pytorch_model.bin", "a missing shard": "model-00002-of-00002.safetensors, which is missing",
    "an index out of the folder": "no index of weights", "a broken index": "no index of weights",
    "two sets of weights": "holds both", "a tensor twice": "both hold", "a dangling link": "safetensors",
    "a truncated file": "safetensors", "a page of HTML": "safetensors", "no tokenizer": "no tokenizer",
    "a broken tokenizer": "tokenizer.json is broken", "a slow tokenizer": "tokenizer.model is a slow tokenizer",
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_other_kinds_of_directories_are_refused_by_name(kind: str, float_model: Make, tmp_path: Path) -> None:
    """Before anything is made: the message names what was found, and says the next step."""
    bad = _other_kind(kind, float_model("mixtral")[1], tmp_path / "bad")
    with pytest.raises(ModelError, match=KINDS[kind]) as caught:
        quantise_directory(bad, tmp_path / "out")
    assert caught.value.fix
    assert not (tmp_path / "out").exists()
    with pytest.raises(ModelError) as caught:
        load_model(bad, "cpu")
    assert caught.value.fix


@pytest.mark.parametrize(
    ("field", "value"),
    [("num_attention_heads", 0), ("hidden_size", "abc"), ("moe_intermediate_size", -1), ("vocab_size", None),
     ("hidden_size", 1.5), ("dtype", []), ("layer_types", True), ("model_type", []), ("rope_parameters", 3)],
)  # fmt: skip
def test_a_config_with_a_wrong_value_is_refused(field: str, value: object, float_model: Make, tmp_path: Path) -> None:
    """However the family's own code fails on it, the three commands that read it name config.json."""
    shutil.copytree(float_model("qwen3_moe")[1], tmp_path / "bad")
    path = tmp_path / "bad/config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    for use in (
        lambda: inspect_directory(tmp_path / "bad"),
        lambda: quantise_directory(tmp_path / "bad", tmp_path / "out"),
        lambda: load_model(tmp_path / "bad", "cpu"),
    ):
        with pytest.raises(ModelError, match=r"bad(/config\.json)?: ") as caught:
            use()
        assert caught.value.fix
    assert not (tmp_path / "out").exists()


def _fields(**changes: object) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        path = directory / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))

    return write


CHANGES: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "a bias that config.json denies": (
        lambda t: {**t, "model.layers.0.self_attn.q_proj.bias": torch.ones(200)},
        "has no model.layers.0.self_attn.q_proj.bias",
    ),
    "integers for embeddings": (
        lambda t: {**t, "model.embed_tokens.weight": t["model.embed_tokens.weight"].to(torch.int32)},
        "embed_tokens.weight is stored as I32",
    ),
    "a missing matrix": (
        lambda t: {n: v for n, v in t.items() if "layers.1.self_attn.q_proj" not in n},
        "lacks model.layers.1.self_attn.q_proj",
    ),
    "a layer more than config.json says": (
        lambda t: t | {n.replace("layers.1.", "layers.2."): v.clone() for n, v in t.items() if ".layers.1." in n},
        "has no model.layers.2",
    ),
    "a matrix on its side": (
        lambda t: {n: v.T.contiguous() if "k_proj" in n else v for n, v in t.items()},
        r"k_proj.weight has shape \(200, 100\), config.json says \(100, 200\)",
    ),
    "an expert more": (
        lambda t: t | {n.replace("s.3.", "s.4."): v.clone() for n, v in t.items() if ".experts.3." in n},
        "has 5 experts, config.json says 4",
    ),
    "halves of two sizes": (
        lambda t: {n: v[:-1].clone() if "experts.2.w1" in n else v for n, v in t.items()},
        r"experts.2.w1.weight has shape \(135, 200\)",
    ),
    "an expert beyond all bounds": (
        lambda t: {**t, "model.layers.0.mlp.experts.99999999999999.gate_proj.weight": torch.ones(1)},
        "has no model.layers.0",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_weights_of_another_model_are_refused_when_quantised_and_when_loaded(
    what: str, float_model: Make, tmp_path: Path
) -> None:
    """Nothing is dropped, and nothing is filled with random numbers as transformers would; the headers tell."""
    change, words = CHANGES[what]
    bad = altered(float_model("mixtral")[1], tmp_path / "bad", change)
    for use in (
        lambda: quantise_directory(bad, tmp_path / "out"),
        lambda: load_model(bad, "cpu"),
        lambda: inspect_directory(bad),
    ):
        with pytest.raises(ModelError, match=words):
            use()
    assert not (tmp_path / "out").exists()


QUANTISED: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "bytes without a sign": (
        lambda t: {n: v.view(torch.uint8) if "o_proj.qweight" in n else v for n, v in t.items()},
        "o_proj.qweight is U8",
    ),
    "a scale too few": (
        lambda t: {n: v[:-1].clone() if "o_proj.scale" in n else v for n, v in t.items()},
        r"o_proj.scale is F32 \(199, 2\)",
    ),
    "floats for whole numbers": (
        lambda t: {n: v.float() if "gate_up_proj_qweight" in n else v for n, v in t.items()},
        "gate_up_proj_qweight is F32",
    ),
    "one that is left over": (lambda t: t | {"model.norm.bias": torch.ones(200)}, "differ at model.norm.bias"),
    "one that is gone": (lambda t: {n: v for n, v in t.items() if n != "model.norm.weight"}, "differ at model.norm"),
}  # fmt: skip


@pytest.mark.parametrize("what", QUANTISED)
def test_a_quantised_directory_with_other_tensors_is_refused_by_its_headers(
    what: str, float_model: Make, tmp_path: Path
) -> None:
    """Bytes read with the wrong sign would be another model without a word."""
    change, words = QUANTISED[what]
    quantise_directory(float_model("mixtral")[1], tmp_path / "good")
    bad = altered(tmp_path / "good", tmp_path / "bad", change)
    for use in (lambda: load_model(bad, "cpu"), lambda: inspect_directory(bad)):
        with pytest.raises(ModelError, match=words) as caught:
            use()
        assert caught.value.fix


def _beside(name: str, content: str | bytes) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        (directory / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def _tokenizer(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def write(directory: Path) -> None:
        path = directory / "tokenizer.json"
        table = json.loads(path.read_text())
        change(table)
        path.write_text(json.dumps(table))

    return write


def _words(table: dict[str, Any]) -> None:
    vocabulary = {"[UNK]": 0, "water": 1, "fire": 2}
    table["pre_tokenizer"] = {"type": "Whitespace"}
    table["model"] = {"type": "WordLevel", "vocab": vocabulary, "unk_token": "[UNK]"}
    table["added_tokens"] = []


_POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n"
FILES: dict[str, tuple[Callable[[Path], None], str]] = {
    "an id past the embeddings": (
        _tokenizer(lambda t: t["model"]["vocab"].update({next(reversed(t["model"]["vocab"])): 99_999})),
        "knows ids up to 99999, the model 320",
    ),
    "a vocabulary of nothing": (_tokenizer(lambda t: t["model"].update(vocab={}, merges=[])), "as unknown"),
    "words of another world": (_tokenizer(_words), "as unknown"),
    "a normaliser that drops all": (
        _tokenizer(lambda t: t.update(normalizer={"type": "Replace", "pattern": {"Regex": ".+"}, "content": ""})),
        "as unknown",
    ),
    "a pointer for weights": (_beside("model.safetensors", _POINTER), "model.safetensors is a Git LFS pointer"),
    "a pointer for a tokenizer": (_beside("tokenizer.json", _POINTER), "tokenizer.json is a Git LFS pointer"),
    "a pointer for a config": (_beside("config.json", _POINTER), "config.json is a Git LFS pointer"),
    "a config with a mark": (_beside("config.json", b"\xef\xbb\xbf{}"), "config.json is no JSON file: .*BOM"),
    "half a tokenizer_config": (_beside("tokenizer_config.json", '{"a'), "tokenizer_config.json is no JSON file"),
    "a list of special tokens": (_beside("special_tokens_map.json", "[]"), "special_tokens_map.json is no JSON file"),
    "added tokens that are none": (_beside("added_tokens.json", b"\xff"), "added_tokens.json is no JSON file"),
    "statistics that are none": (_beside("features.safetensors", "{}"), "features.safetensors is no safetensors"),
    "statistics of another width": (
        lambda d: save_file({"mean": torch.zeros(3), "std": torch.ones(3)}, d / "features.safetensors"),
        "finite mean and std of 200",
    ),
    "statistics of NaN": (
        lambda d: save_file({"mean": torch.zeros(200) / 0, "std": torch.ones(200)}, d / "features.safetensors"),
        "finite mean and std of 200",
    ),
    "too many experts for a token": (_fields(num_experts_per_tok=5), "5 of 4 experts for a token"),
    "no expert for a token": (_fields(num_experts_per_tok=0), "0 of 4 experts for a token"),
}  # fmt: skip


@pytest.mark.parametrize("what", FILES)
def test_a_file_that_the_model_cannot_be_used_with_is_named_by_every_command(
    what: str, float_model: Make, tmp_path: Path
) -> None:
    """A model that quantises well and is then unusable is refused at once, by the file's name."""
    write, words = FILES[what]
    shutil.copytree(float_model("mixtral")[1], tmp_path / "bad")
    write(tmp_path / "bad")
    for use in (
        lambda: quantise_directory(tmp_path / "bad", tmp_path / "out"),
        lambda: load_model(tmp_path / "bad", "cpu"),
        lambda: inspect_directory(tmp_path / "bad"),
    ):
        with pytest.raises(ModelError, match=words) as caught:
            use()
        assert caught.value.fix
    assert not (tmp_path / "out").exists()


def test_a_path_that_is_no_text_is_told_as_such(float_model: Make, tmp_path: Path) -> None:
    """The libraries below would call a sound file broken."""
    bad = tmp_path / "m\udcff"
    shutil.copytree(float_model("mixtral")[1], bad)
    with pytest.raises(ModelError, match="the path is no UTF-8 text") as caught:
        inspect_directory(bad)
    assert "LC_ALL" in caught.value.fix


@pytest.mark.parametrize("layout", ["no index", "an index without metadata", "a variant's name"])
def test_float_weights_that_can_be_quantised_can_be_loaded(layout: str, float_model: Make, tmp_path: Path) -> None:
    """One reader for both: what transformers asks of names and index, the weights do not need."""
    model, good = float_model("granitemoe")
    shutil.copytree(good, tmp_path / "it")
    weights = tmp_path / "it/model.safetensors"
    if layout == "a variant's name":
        weights.rename(tmp_path / "it/model.fp16.safetensors")
    else:
        tensors = load_file(weights)
        weights.unlink()
        halves = (list(tensors)[::2], list(tensors)[1::2])
        for number, names in enumerate(halves):
            save_file({name: tensors[name] for name in names}, tmp_path / f"it/part-{number}.safetensors")
        if layout == "an index without metadata":
            where = {name: f"part-{number}.safetensors" for number, names in enumerate(halves) for name in names}
            (tmp_path / "it/model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    quantise_directory(tmp_path / "it", tmp_path / "q")
    with torch.no_grad():
        assert torch.equal(load_model(tmp_path / "it", "cpu").module(IDS).logits, model(IDS).logits)


def test_a_tokenizer_without_a_token_for_padding_suffices(float_model: Make, tmp_path: Path) -> None:
    """Features of texts of several lengths, one of them empty, are those that each has alone."""
    shutil.copytree(float_model("mixtral")[1], tmp_path / "it")
    path = tmp_path / "it/tokenizer_config.json"
    path.write_text(json.dumps({n: v for n, v in json.loads(path.read_text()).items() if n != "pad_token"}))
    model = load_model(tmp_path / "it", "cpu")
    assert model.tokenizer.pad_token_id is None
    texts = ["cholera", "", "a room where patients are seen"]
    alone = torch.cat([pooled_features(model, [text]) for text in texts])
    assert torch.allclose(pooled_features(model, texts), alone, atol=1e-5)


def test_every_file_that_changes_what_a_text_becomes_is_in_the_digest(float_model: Make, tmp_path: Path) -> None:
    """Two sites with one digest read a text alike."""
    good = float_model("mixtral")[1]
    digests = {inspect_directory(good).digest}
    for name, content in (
        ("added_tokens.json", '{"<more>": 319}'),
        ("special_tokens_map.json", '{"pad_token": "<s>"}'),
    ):
        shutil.copytree(good, tmp_path / name)
        (tmp_path / name / name).write_text(content)
        digests.add(inspect_directory(tmp_path / name).digest)
    assert len(digests) == 3


def test_what_releases_hold_beside_the_model_is_left_out(float_model: Make, tmp_path: Path) -> None:
    """A multi-token layer past the last one and rotary frequencies; mixed float types are kept as they are."""
    _, good = float_model("deepseek_v3")

    def more(tensors: Tensors) -> Tensors:
        made = {n: v.to(torch.bfloat16) if "norm" in n else v for n, v in tensors.items()}
        extra = {
            "model.layers.2.eh_proj.weight": torch.ones(2, 2),
            "model.layers.2.mlp.experts.0.gate_proj.weight": torch.ones(2, 2),
            "model.layers.2.mlp.experts.0.up_proj.weight": torch.ones(2, 2),
            "model.layers.2.mlp.experts.0.down_proj.weight": torch.ones(2, 2),
            "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        }
        return {**made, **extra}

    report = quantise_directory(altered(good, tmp_path / "more", more), tmp_path / "q")
    assert 0 < report.bytes_before < (good / "model.safetensors").stat().st_size
    load_model(tmp_path / "q", "cpu")


def test_tied_embeddings(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """A tied head may be stored as well, when it is the embeddings; a family's own default for tying is followed."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=320, hidden_size=64, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=64, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, tie_word_embeddings=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    model.save_pretrained(tmp_path / "tied")
    tokenizer.save_pretrained(tmp_path / "tied")
    stored = altered(
        tmp_path / "tied", tmp_path / "twice", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"].clone()}
    )
    other = altered(
        tmp_path / "tied", tmp_path / "other", lambda t: {**t, "lm_head.weight": t["model.embed_tokens.weight"] + 1}
    )
    quantise_directory(tmp_path / "tied", tmp_path / "a")
    quantise_directory(stored, tmp_path / "b")
    assert (tmp_path / "a/model.safetensors").read_bytes() == (tmp_path / "b/model.safetensors").read_bytes()
    for name in ("a", "b", "twice"):
        loaded = load_model(tmp_path / name, "cpu").module
        assert loaded.get_submodule("lm_head").weight is loaded.get_submodule("model.embed_tokens").weight
    with pytest.raises(ModelError, match=r"lm_head\.weight differs from the embeddings"):
        quantise_directory(other, tmp_path / "c")


def test_a_cache_of_linked_blobs_is_read(float_model: Make, tmp_path: Path) -> None:
    """As Hugging Face's cache keeps a release: every file a link to a blob named by its digest."""
    _, good = float_model("olmoe")
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    for number, path in enumerate(sorted(good.iterdir())):
        shutil.copyfile(path, tmp_path / f"blobs/{number:064x}")
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{number:064x}")
    quantise_directory(good, tmp_path / "a")
    quantise_directory(tmp_path / "snapshot", tmp_path / "b")
    assert inspect_directory(tmp_path / "a").digest == inspect_directory(tmp_path / "b").digest
    assert not any(path.is_symlink() for path in (tmp_path / "b").iterdir())


def test_a_slow_tokenizer_is_converted_where_transformers_can(
    tokenizer: PreTrainedTokenizerFast, float_model: Make, tmp_path: Path
) -> None:
    """vocab.json and merges.txt alone: the quantised directory has a tokenizer.json that gives the same ids."""
    _, good = float_model("olmoe")
    slow = tmp_path / "slow"
    shutil.copytree(good, slow)
    model = json.loads((slow / "tokenizer.json").read_text())["model"]
    merges = [each if isinstance(each, str) else " ".join(each) for each in model["merges"]]
    (slow / "vocab.json").write_text(json.dumps(model["vocab"]))
    (slow / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n")
    (slow / "tokenizer.json").unlink()
    (slow / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "GPT2Tokenizer"}))
    quantise_directory(slow, tmp_path / "q")
    assert (tmp_path / "q/tokenizer.json").is_file()
    made = load_model(tmp_path / "q", "cpu").tokenizer
    text = "cholera due to a room"
    assert made(text)["input_ids"]
    assert set(made(text)["input_ids"]) <= set(range(320))
    assert made.decode(made(text)["input_ids"]).strip() == text


def test_a_tokenizer_of_another_model_is_refused_before_anything_is_quantised(
    float_model: Make, tmp_path: Path
) -> None:
    """More ids than the embeddings have rows."""
    bad = tmp_path / "bad"
    shutil.copytree(float_model("olmoe")[1], bad)
    made = PreTrainedTokenizerFast.from_pretrained(bad)
    made.add_tokens([f"word{n}" for n in range(400)])
    made.save_pretrained(bad)
    with pytest.raises(ModelError, match="the tokenizer knows"):
        quantise_directory(bad, tmp_path / "out")
    assert not (tmp_path / "out").exists()


_QUANTISE = """
import resource, sys
from pathlib import Path
import fl_client.model.quantise as q
q.SHARD_BYTES = 100_000
if sys.argv[3] == "full":
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
    import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
def slow(done, total):
    if sys.argv[3] == "killed" and done > total // 2:
        print("half", flush=True)
        import time; time.sleep(60)
from fl_shared.errors import ModelError
try:
    q.quantise_directory(Path(sys.argv[1]), Path(sys.argv[2]), progress=slow)
except ModelError as error:
    print("refused:", error.message, "|", error.fix)
"""


def test_a_full_disk_leaves_nothing_and_a_killed_quantiser_no_model(float_model: Make, tmp_path: Path) -> None:
    """A file-size limit stands in for the full disk; after kill -9 the half-written folder has no config.json."""
    _, good = float_model("qwen2_moe")
    line = [sys.executable, "-c", _QUANTISE, str(good)]
    done = subprocess.run([*line, str(tmp_path / "full"), "full"], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("refused:"), done.stderr
    assert "make room" in done.stdout
    assert not (tmp_path / "full").exists()
    with subprocess.Popen([*line, str(tmp_path / "killed"), "killed"], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip() == "half"
        process.kill()
    assert any((tmp_path / "killed").iterdir())
    with pytest.raises(ModelError, match=r"no readable config\.json"):
        load_model(tmp_path / "killed", "cpu")


def test_a_copy_that_lost_a_shard_is_no_model(
    float_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A quantised directory in several shards, each taken away or cut short in turn."""
    monkeypatch.setattr("fl_client.model.quantise.SHARD_BYTES", 200_000)
    _, good = float_model("qwen2_moe")
    quantise_directory(good, tmp_path / "q")
    load_model(tmp_path / "q", "cpu")
    shards = sorted((tmp_path / "q").glob("model-*.safetensors"))
    assert len(shards) > 2
    for shard in (shards[0], shards[-1]):
        content = shard.read_bytes()
        shard.unlink()
        with pytest.raises(ModelError, match=shard.name):
            load_model(tmp_path / "q", "cpu")
        shard.write_bytes(content[:-1])
        with pytest.raises(ModelError, match=shard.name):
            load_model(tmp_path / "q", "cpu")
        shard.write_bytes(content)
    load_model(tmp_path / "q", "cpu")
