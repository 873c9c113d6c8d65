"""The recipe of tiny: what enters the corpus, the tokenizer, the balanced router, a short real pretraining."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from fl_client.data.icd10 import hospital_split, is_held_out
from fl_client.model.load import load_model
from fl_client.model.quantise import quantise_directory
from fl_client.model.recipe import pretrain as recipe
from fl_client.model.recipe.corpus import PER_CATEGORY, find_wordnet, icd_lines, wordnet_glosses
from fl_client.model.recipe.probe import probe_accuracy
from fl_shared.errors import DataError

# Lines in the format of wndb(5WN): offset, file number, type, word count (hex), words with ids, pointers | gloss.
_NOUN = """\
  1 This software and database is being provided to you, the LICENSEE, by
00001740 03 n 01 entity 0 003 ~ 00001930 n 0000 | that which is perceived to have its own existence
14070360 26 n 02 disease 0 sick_ness(a) 1 000 | an impairment of health; "he has a disease"; "she too"
00002000 03 n 04 one 0 two_words 0 three 0 four 0 000 | more lemmas than are kept
"""


@pytest.fixture(scope="module")
def wordnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A WordNet of four files and four glosses."""
    folder = tmp_path_factory.mktemp("wordnet")
    (folder / "data.noun").write_text(_NOUN, encoding="latin-1")
    (folder / "data.verb").write_text("00003000 29 v 01 cure 0 000 | provide a cure for\n", encoding="latin-1")
    for part in ("adj", "adv"):
        (folder / f"data.{part}").write_text("", encoding="latin-1")
    return folder


def test_glosses_are_read_without_licence_examples_and_markers(wordnet: Path) -> None:
    """Each synset gives `lemmas: gloss`, at most three lemmas, spaces for underscores."""
    assert wordnet_glosses(find_wordnet(wordnet)) == [
        "entity: that which is perceived to have its own existence",
        "disease, sick ness: an impairment of health",
        "one, two words, three: more lemmas than are kept",
        "cure: provide a cure for",
    ]


def test_a_missing_wordnet_is_said(tmp_path: Path) -> None:
    """The error names the folder and how to get the data."""
    with pytest.raises(DataError, match=r"data\.noun") as caught:
        find_wordnet(tmp_path)
    assert "--wordnet" in caught.value.fix


@pytest.fixture(scope="module")
def icd() -> ModuleType:
    """The terminology's package; its import takes seconds."""
    return importlib.import_module("simple_icd_10_cm")


@pytest.fixture(scope="module")
def codes() -> list[str]:
    """The corpus' ICD-10 lines of seed 0."""
    return icd_lines(0)


def test_the_corpus_holds_nothing_that_is_held_out(icd: ModuleType, codes: list[str]) -> None:
    """No line starts with a held-out description or with any held-out row of the hospital task."""
    starts = {line.split(": ")[0] for line in codes}
    held_out = {icd.get_description(c) for c in icd.get_all_codes(True) if icd.is_category(c) and is_held_out(c)}
    kept = {icd.get_description(c) for c in icd.get_all_codes(True) if not is_held_out(c[:3])}
    assert held_out - kept
    assert not starts & (held_out - kept)
    _, test = hospital_split()
    assert not {start.lower() for start in starts} & {text.lower() for text, _ in test}


def test_no_category_dominates_the_corpus(icd: ModuleType, codes: list[str]) -> None:
    """Each training category gives at most twelve lines, and the seed alone decides which."""
    titles = {icd.get_description(c) for c in icd.get_all_codes(True) if icd.is_category(c) and not is_held_out(c)}
    assert PER_CATEGORY < len(codes) < 0.9 * PER_CATEGORY * len(titles)
    # S52 has hundreds of codes.
    assert sum("Fracture of forearm; " in line for line in codes) <= PER_CATEGORY
    assert codes == icd_lines(0)


@settings(max_examples=100)
@given(st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), max_size=40))
def test_no_text_is_out_of_vocabulary(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    """Any text, in any script, decodes to itself, lower-cased and normalised; only spacing may differ."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    wanted = tokenizer.backend_tokenizer.normalizer.normalize_str(text)
    assert tokenizer.decode(ids, skip_special_tokens=False).replace(" ", "") == wanted.replace(" ", "")


class _Gate(torch.nn.Module):
    """Stands where DeepSeek's router stands: gives (logits, weights, chosen experts)."""

    def __init__(self) -> None:
        super().__init__()
        self.num_experts, self.top_k = 4, 2
        self.register_buffer("e_score_correction_bias", torch.zeros(4))

    def forward(self, chosen: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor]:
        return torch.zeros(len(chosen), 4), None, chosen


class _Backbone(torch.nn.Module):
    """Token ids [rows, width] stand for a row of `CHOICES` each."""

    CHOICES = torch.tensor([[0, 1], [0, 2], [2, 3]])

    def __init__(self) -> None:
        super().__init__()
        self.gate = _Gate()

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> None:
        self.gate(self.CHOICES[input_ids.flatten()])


def test_the_bias_moves_against_the_load() -> None:
    """An overloaded expert's bias falls, an idle one's rises, one at the mean stays; padding is not counted."""
    model = torch.nn.Module()
    model.model = _Backbone()
    bias = model.model.gate.e_score_correction_bias
    ids, mask = torch.tensor([[0, 1], [0, 1], [2, 2]]), torch.tensor([[1, 1], [1, 1], [0, 0]])
    with recipe.RouterLoad(model) as load:
        model.model(input_ids=ids, attention_mask=mask)  # loads 4, 2, 2, 0
        assert load.shares() == [[2.0, 1.0, 1.0, 0.0]]
        load.rebalance(0.1)
        torch.testing.assert_close(bias, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
        load.rebalance(0.1)
        torch.testing.assert_close(bias, torch.tensor([-0.1, 0.0, 0.0, 0.1]))
        model.model(input_ids=ids)  # no mask: every token counts
        assert load.loads[0].tolist() == [4.0, 2.0, 4.0, 2.0]
    model.model(input_ids=ids)
    assert load.loads[0].sum() == 12, "a closed counter counts nothing"


def test_batches_hold_every_sequence_once_an_epoch() -> None:
    """One pass over the batches gives each sequence once, padded with zeros under a zero mask."""
    sequences = [[1, *range(3, 3 + n % 7), 2] for n in range(50)]
    seen: list[tuple[int, ...]] = []
    for ids, mask in recipe._batches(sequences, seed=0):
        assert ids.numel() <= max(recipe.BATCH_TOKENS, ids.shape[1])
        assert not ids[mask == 0].any()
        seen += [tuple(row[keep.bool()].tolist()) for row, keep in zip(ids, mask, strict=True)]
        if len(seen) >= len(sequences):
            break
    assert sorted(seen) == sorted(map(tuple, sequences))


def test_the_probe_finds_what_is_there_and_nothing_else() -> None:
    """Separable classes are told apart; shuffled labels are not."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(3, 8, generator=generator) * 3

    def rows(n: int) -> tuple[torch.Tensor, list[str]]:
        which = torch.randint(3, (n,), generator=generator)
        return centres[which] + torch.randn(n, 8, generator=generator), [f"c{int(w)}" for w in which]

    (x, y), (u, v) = rows(300), rows(300)
    assert probe_accuracy((x.numpy(), y), (u.numpy(), v), 1e-3) > 0.9
    wrong = [y[int(i)] for i in torch.randperm(300, generator=generator)]
    assert probe_accuracy((x.numpy(), wrong), (u.numpy(), v), 1e-3) < 0.6


def test_a_few_real_steps_learn_and_give_a_directory_that_quantises(
    tmp_path: Path, wordnet: Path, codes: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pretraining on the real ICD lines lowers the loss from chance; the directory quantises and loads."""
    torch.set_num_threads(1)
    monkeypatch.setattr(recipe, "BATCH_TOKENS", 256)
    monkeypatch.setattr(recipe, "icd_lines", lambda _seed: codes[::40])
    report = recipe.pretrain(tmp_path / "float", steps=12, wordnet=wordnet)
    assert report["loss"] < math.log(recipe.VOCABULARY)
    assert (report["steps"], report["wordnet_glosses"]) == (12, 4)
    quantise_directory(tmp_path / "float", tmp_path / "int8", keep_dtype=torch.float16)
    model = load_model(tmp_path / "int8", "cpu")
    ids = model.tokenizer("typhoid fever", return_tensors="pt")["input_ids"]
    with recipe.RouterLoad(model.module) as load:
        assert torch.isfinite(model.module(ids).logits).all()
    assert [len(layer) for layer in load.shares()] == [16, 16, 16]
