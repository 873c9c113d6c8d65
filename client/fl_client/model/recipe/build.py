"""Build `tiny` from nothing: pretrain, quantise, measure feature statistics, expert load and probe, write the card."""

from __future__ import annotations

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from fl_client.data.icd10 import hospital_split, public_descriptions
from fl_client.model.features import pooled_features
from fl_client.model.inspect import inspect_directory
from fl_client.model.load import LoadedModel, load_model
from fl_client.model.quantise import quantise_directory
from fl_client.model.recipe.corpus import find_wordnet, wordnet_glosses
from fl_client.model.recipe.pretrain import RouterLoad, pretrain
from fl_client.model.recipe.probe import probe_accuracy
from fl_shared.cli.output import Say
from fl_shared.errors import ModelError

LEAST_LOAD = 0.25
_CARD = """# tiny

A DeepSeek-V3-style Mixture-of-Experts language model, small enough to ship: {parameters:,} parameters, 4 layers, 16
routed experts (top-2) and 1 shared expert a layer, its own 6,144-token vocabulary. int8 symmetric, group 128;
embeddings in float16.

It exists so that Concordat's main job runs on a laptop without a model hub. It is no assistant and knows no medicine.

* Corpus: {wordnet_glosses:,} WordNet 3.0 glosses (Princeton University's WordNet licence) and {icd_descriptions:,}
  ICD-10-CM descriptions with the titles above them, of training categories only. No inclusion term and nothing of a
  held-out category was seen.
* Router: balanced as in DeepSeek-V3 (selection bias and sequence-wise loss); least loaded expert {least:.2f} of the
  even share.
* Linear probe on frozen, mean-pooled features, hospital task split by category: {probe:.3f} (majority {majority:.3f}).
* Recipe: `fl-model build tiny`; all figures in `report.json`.
"""


def build_tiny(out: Path, *, steps: int, wordnet: Path | None, say: Say) -> dict[str, Any]:
    """Write the finished int8 directory to `out` (new or empty); the report that lies in it.

    Raises:
        ModelError: `out` holds files, or an expert gets less than a quarter of the even share.
        DataError: WordNet is not on this machine.
    """
    if out.exists() and any(out.iterdir()):
        raise ModelError(f"{out} holds files", fix="name a new or empty folder")
    find_wordnet(wordnet)
    with tempfile.TemporaryDirectory() as scratch:
        float_directory = Path(scratch) / "float"
        report = pretrain(float_directory, steps=steps, wordnet=wordnet, say=say)
        say("quantising")
        return finish(float_directory, out, report, wordnet=wordnet, say=say)


def finish(
    float_directory: Path, out: Path, report: dict[str, Any], *, wordnet: Path | None, say: Say
) -> dict[str, Any]:
    """Quantise a pretrained directory, measure it, and write report and card."""
    sizes = quantise_directory(float_directory, out, keep_dtype=torch.float16)
    model = load_model(out, "cpu")
    say("measuring features and experts' load on public text")
    glosses = wordnet_glosses(find_wordnet(wordnet))[::97]
    descriptions = [text for text, _ in public_descriptions()][::23]
    with RouterLoad(model.module) as load:
        features = pooled_features(model, glosses + descriptions)
    least = min(share for layer in load.shares() for share in layer)
    if least < LEAST_LOAD:
        raise ModelError(f"an expert gets {least:.2f} of the even share", fix="train longer: --steps")
    mean, std = features.mean(0), features.std(0)
    save_file({"mean": mean, "std": std}, out / "features.safetensors")
    say("probing")
    train, test = hospital_split()
    with RouterLoad(model.module) as task_load:
        pooled_features(model, [text for text, _ in train][::7])
    accuracy = _probe(model, train, test, mean, std)
    labels = [label for _, label in test]
    report |= {
        "parameters": inspect_directory(out).parameters,
        "quantised_size_ratio": round(sizes.quantised_after / sizes.quantised_before, 4),
        "probe_accuracy": round(accuracy, 4),
        "probe_majority": round(max(labels.count(label) for label in set(labels)) / len(labels), 4),
        "probe_train_rows": len(train),
        "probe_test_rows": len(test),
        "expert_load_over_even_share": [[round(share, 3) for share in layer] for layer in load.shares()],
        "least_expert_load": round(least, 3),
        "expert_load_on_hospital_task": [[round(share, 3) for share in layer] for layer in task_load.shares()],
        "versions": {name: version(name) for name in ("simple-icd-10-cm", "torch", "transformers", "tokenizers")},
    }
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    card = _CARD.format(
        parameters=report["parameters"],
        wordnet_glosses=report["wordnet_glosses"],
        icd_descriptions=report["icd_descriptions"],
        least=least,
        probe=accuracy,
        majority=report["probe_majority"],
    )
    (out / "MODEL_CARD.md").write_text(card, encoding="utf-8")
    return report


def _probe(
    model: LoadedModel,
    train: list[tuple[str, str]],
    test: list[tuple[str, str]],
    mean: torch.Tensor,
    std: torch.Tensor,
) -> float:
    def side(rows: list[tuple[str, str]]) -> tuple[Any, list[str]]:
        scaled = (pooled_features(model, [text for text, _ in rows]) - mean) / std.clamp_min(1e-6)
        return scaled.numpy(), [label for _, label in rows]

    return probe_accuracy(side(train), side(test), penalty=1e-3)
