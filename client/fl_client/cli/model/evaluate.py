"""`fl-model evaluate`: accuracy on public data (nothing is accounted: never name private data)."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fl_client.cli.model.options import adapter_of, add_model, add_output, at_work, show
from fl_shared.cli.output import Say
from fl_shared.cli.verbs import path
from fl_shared.errors import DataError

EXAMPLES = """
fl-model evaluate --spec spec.toml --data held-out.csv --adapter run.safetensors
fl-model evaluate --model ./olmoe-int8 --spec spec.toml --data held-out.csv --zero-shot --json
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    add_output(parser)
    add_model(parser)
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", type=path, help="the run's adapter (safetensors)")
    which.add_argument("--zero-shot", action="store_true", help="no adapter: the nearest label title wins")
    parser.add_argument("--data", type=path, required=True, help="a table with public rows (CSV, JSONL, Parquet)")
    parser.add_argument("--text-column", default="text", help="default: text")
    parser.add_argument("--label-column", default="label", help="default: label")
    parser.add_argument("--titles", type=path, help="with --zero-shot: CSV with the columns label,title")


def run(arguments: argparse.Namespace) -> int:
    """Print accuracy and the majority's share."""
    with at_work(arguments) as say:
        figures = _evaluate(arguments, say)
    return show(arguments, figures)


def _evaluate(arguments: argparse.Namespace, say: Say) -> dict[str, Any]:
    from fl_client.tasks.registry import task_of
    from fl_shared.documents.spec import RunSpec

    spec = RunSpec.from_toml(arguments.spec)
    rows = _read_rows(arguments.data, arguments.text_column, arguments.label_column)
    texts, known = [row[0] for row in rows], task_of(spec).accepted([row[1].strip() for row in rows])
    labels = [label for label in known if label is not None]
    if len(labels) < len(known):
        raise DataError(
            f"{arguments.data}: row {known.index(None) + 1} has a label that the spec has not "
            f"({len(known) - len(labels)} of {len(known)} rows)",
            fix="leave these rows out, or correct --label-column",
        )
    offset = {} if arguments.zero_shot else adapter_of(arguments.adapter)
    say(f"loading the base model {arguments.model}")
    from fl_client.inference.predict import evaluate
    from fl_client.inference.zero_shot import evaluate_zero_shot
    from fl_client.model.load import load_model

    model = load_model(arguments.model, arguments.device)
    say(f"evaluating {len(texts)} rows")
    if arguments.zero_shot:
        pairs = _read_rows(arguments.titles, "label", "title") if arguments.titles else []
        result = evaluate_zero_shot(model, texts, labels, {row[0]: row[1] for row in pairs}, spec)
    else:
        result = evaluate(model, offset, texts, labels, spec)
    adapter = None if arguments.zero_shot else str(arguments.adapter)
    return {**result.figures, "n": result.n, "adapter": adapter}


def _read_rows(file: Path, *columns: str) -> list[tuple[str, ...]]:
    from fl_client.data.tables import read_columns

    table = read_columns(file, list(columns))
    return list(zip(*(table[name] for name in columns), strict=True))
