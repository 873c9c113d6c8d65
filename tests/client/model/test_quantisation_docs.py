"""The tables of docs/quantisation.md hold the committed result of `tests/benchmarks/quantisation.py`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
RESULT = ROOT / "tests/benchmarks/results/quantisation-2-core-cpu.json"
MODELS = {entry["name"]: entry for entry in json.loads(RESULT.read_text(encoding="utf-8"))["models"]}
ITSELF = "tiny, int8 as shipped"  # held against its own weights: no error to show
# Column to (key in the result, decimals), by the heads of the tables.
TABLES = {
    "error": {"logit error": ("logit_error", 3), "same top token": ("same_top_token", 3),
              "tokens rerouted": ("tokens_rerouted", 3)},
    "speed": {"forward": ("forward_ratio", 2), "backward": ("backward_ratio", 2),
              "tokens/s, generation": ("generate_tokens_per_s_ratio", 2)},
}  # fmt: skip


def rows(head: tuple[str, ...]) -> list[list[str]]:
    """The cells of every row of the table with this head."""
    lines = (ROOT / "docs/quantisation.md").read_text(encoding="utf-8").splitlines()
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    start = cells.index(list(head)) + 2
    return cells[start : next(at for at in range(start, len(lines)) if not lines[at].startswith("|"))]


@pytest.mark.parametrize("table", TABLES)
def test_each_row_is_that_of_the_result(table: str) -> None:
    """Every measured model has its row under its own name, and every figure is the result's, rounded."""
    columns = TABLES[table]
    wanted = {
        name: [f"{entry[key]:.{decimals}f}" for key, decimals in columns.values()]
        for name, entry in MODELS.items()
        if table == "speed" or name != ITSELF
    }
    assert {name: cells for name, *cells in rows(("model", *columns))} == wanted


@pytest.mark.parametrize(
    ("row", "key"),
    [("bytes over float32, groups of 128", "size_ratio"),
     ("with embeddings, shipped `tiny`", "size_ratio_with_embeddings")],
)  # fmt: skip
def test_sizes_are_those_of_the_result(row: str, key: str) -> None:
    """The sizes of the two widths are `tiny`'s."""
    cells = {name: cells for name, *cells in rows(("", "int8", "int4"))}
    assert cells[row] == [f"{MODELS[name][key]:.3f}" for name in (ITSELF, "tiny, int4")]
