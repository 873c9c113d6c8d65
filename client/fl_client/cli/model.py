"""`fl-model`: build, quantise, inspect and evaluate base models; turn a run's adapter into a PEFT directory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from fl_shared.completion import complete
from fl_shared.errors import DataError, ModelError, cli_main
from fl_shared.offline import stay_offline

EXAMPLES = """\
examples:
  fl-model inspect tiny                         the base that ships with the package
  fl-model inspect ./OLMoE-1B-7B --json
  fl-model quantize ./OLMoE-1B-7B ./olmoe-int8
  fl-model quantize ./OLMoE-1B-7B ./olmoe-int4 --bits 4
  fl-model build tiny --out ./tiny --wordnet /usr/share/wordnet
  fl-model evaluate --model tiny --spec spec.toml --data held-out.csv --adapter run.safetensors
  fl-model export-adapter --model tiny --spec spec.toml --adapter run.safetensors ./peft

exit codes: 0 success, 2 wrong arguments, 14 model, 15 data, 70 a defect, 130 Ctrl-C
"""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="fl-model", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text, description=text)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print JSON")
        return made

    build = verb("build", _build, "build a base model from nothing")
    build.add_argument("name", choices=["tiny"])
    build.add_argument("--out", type=Path, default=Path("tiny"), help="new folder (default: ./tiny)")
    build.add_argument("--steps", type=_positive, default=2200, help="pretraining steps (default: 2200)")
    build.add_argument("--wordnet", type=Path, help="folder with WordNet's data.noun")
    quantize = verb("quantize", _quantize, "quantise a Hugging Face MoE directory, tensor by tensor")
    quantize.add_argument("directory", type=Path)
    quantize.add_argument("out", type=Path, help="new folder")
    quantize.add_argument(
        "--bits", type=int, choices=[4, 8], default=8, help="8 (default), or 4: half the memory, larger errors"
    )
    inspect = verb("inspect", _inspect, "parameters, active parameters a token, bytes, digest")
    inspect.add_argument("directory", help="a model directory, or tiny")
    evaluate = verb("evaluate", _evaluate, "accuracy on public data (nothing is accounted: never name private data)")
    export = verb("export-adapter", _export, "write a run's adapter as a PEFT directory")
    for each in (evaluate, export):
        each.add_argument("--model", default="tiny", help="a model directory, or tiny (default)")
        each.add_argument("--spec", type=Path, required=True, help="the run's spec")
        each.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu")
    which = evaluate.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", type=Path, help="the run's adapter (safetensors)")
    which.add_argument("--zero-shot", action="store_true", help="no adapter: the nearest label title wins")
    evaluate.add_argument("--data", type=Path, required=True, help="a table with public rows (CSV, JSONL, Parquet)")
    evaluate.add_argument("--text-column", default="text")
    evaluate.add_argument("--label-column", default="label")
    evaluate.add_argument("--titles", type=Path, help="with --zero-shot: CSV with the columns label,title")
    export.add_argument("--adapter", type=Path, required=True, help="the run's adapter (safetensors)")
    export.add_argument("out", type=Path, help="new folder")
    return top


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{value} is not positive")
    return value


def _print(options: argparse.Namespace, table: dict[str, Any]) -> None:
    if options.json:
        print(json.dumps(table, indent=2))
        return
    shown = Table(show_header=False, box=None)
    for name, value in table.items():
        text = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
        shown.add_row(name.replace("_", " "), text)
    Console().print(shown)


def _build(options: argparse.Namespace) -> int:
    from fl_client.model.recipe.build import build_tiny

    report = build_tiny(options.out, steps=options.steps, wordnet=options.wordnet, say=Console(stderr=True).print)
    _print(options, report)
    return 0


def _quantize(options: argparse.Namespace) -> int:
    from fl_client.model.inspect import inspect_directory
    from fl_client.model.quantise import quantise_directory

    with Progress(console=Console(stderr=True)) as bar:
        task = bar.add_task("quantising", total=None)
        report = quantise_directory(
            options.directory,
            options.out,
            options.bits,
            progress=lambda done, total: bar.update(task, completed=done, total=total),
        )
    _print(options, {
        "directory": str(options.out),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "quantised_layers_ratio": round(report.quantised_after / report.quantised_before, 4),
        "digest": inspect_directory(options.out).digest,
    })  # fmt: skip
    return 0


def _inspect(options: argparse.Namespace) -> int:
    from fl_client.model.inspect import inspect_directory
    from fl_client.model.load import resolve

    _print(options, inspect_directory(resolve(options.directory)).to_dict())
    return 0


def _read_rows(path: Path, *columns: str) -> list[tuple[str, ...]]:
    from fl_client.data.tables import read_columns

    found = read_columns(path, list(columns))
    return list(zip(*(found[name] for name in columns), strict=True))


def _read_adapter(path: Path) -> dict[str, Any]:
    from fl_shared.adapter import unpack

    try:
        return unpack(path.read_bytes())
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}", fix="check --adapter") from error


def _say(text: str) -> None:
    """One line of progress, apart from the result: loading torch and a base takes seconds to minutes."""
    print(text, file=sys.stderr, flush=True)


def _evaluate(options: argparse.Namespace) -> int:
    from fl_shared.manifest import RunSpec

    spec = RunSpec.from_toml(options.spec)
    rows = _read_rows(options.data, options.text_column, options.label_column)
    from fl_client.data.spellings import run_labels

    texts, known = [row[0] for row in rows], run_labels([row[1].strip() for row in rows], spec.task.labels)
    labels = [label for label in known if label is not None]
    if len(labels) < len(known):
        raise DataError(
            f"{options.data}: row {known.index(None) + 1} has a label that the spec has not "
            f"({len(known) - len(labels)} of {len(known)} rows)",
            fix="leave these rows out, or correct --label-column",
        )
    offset = {} if options.zero_shot else _read_adapter(options.adapter)
    _say(f"loading the base model {options.model}")
    from fl_client.model.load import load_model
    from fl_client.training import evaluate

    model = load_model(options.model, options.device)
    _say(f"evaluating {len(texts)} rows")
    if options.zero_shot:
        from fl_client.model.zero_shot import nearest_title

        rows_of_titles = _read_rows(options.titles, "label", "title") if options.titles else []
        titles = {row[0]: row[1] for row in rows_of_titles}
        guesses = nearest_title(model, texts, {label: titles.get(label, label) for label in spec.task.labels})
        accuracy = sum(guess == label for guess, label in zip(guesses, labels, strict=True)) / len(labels)
        majority = max(labels.count(label) for label in set(labels)) / len(labels)
        _print(options, {"accuracy": accuracy, "majority": majority, "n": len(labels), "adapter": None})
        return 0
    result = evaluate(model, offset, texts, labels, spec)
    _print(options, {"accuracy": result.accuracy, "majority": result.majority, "n": result.n,
                     "adapter": str(options.adapter)})  # fmt: skip
    return 0


def _export(options: argparse.Namespace) -> int:
    from fl_client.files import require_empty
    from fl_shared.manifest import RunSpec

    require_empty(options.out)
    spec, offset = RunSpec.from_toml(options.spec), _read_adapter(options.adapter)
    _say(f"loading the base model {options.model}")
    from fl_client.model.load import load_model
    from fl_client.training import export_peft

    model = load_model(options.model, options.device)
    _say(f"writing {options.out}, and loading it with PEFT")
    export_peft(model, spec, offset, options.out)
    _print(options, {"directory": str(options.out)})
    return 0


def _run(argv: Sequence[str] | None) -> int:
    made = parser()
    complete(made)
    options = made.parse_args(argv)
    code: int = options.run(options)
    return code


def main() -> None:
    """The console script."""
    stay_offline()
    sys.exit(cli_main(_run))


if __name__ == "__main__":
    main()
