"""`fl-model`: build, quantise, inspect and evaluate base models; turn a run's adapter into a PEFT directory."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from fl_shared.cli.completion import complete
from fl_shared.cli.console import facts, working
from fl_shared.cli.entry import cli_main
from fl_shared.cli.extras import require
from fl_shared.cli.parsers import add_quiet, add_version, describe, path
from fl_shared.errors import DataError
from fl_shared.runtime.offline import stay_offline

EXAMPLES = """\
examples:
  fl-model inspect tiny                         # the base that ships with the package
  fl-model inspect ./OLMoE-1B-7B --json
  fl-model quantize ./OLMoE-1B-7B ./olmoe-int8
  fl-model quantize ./OLMoE-1B-7B ./olmoe-int4 --bits 4
  fl-model build tiny --out ./tiny --wordnet /usr/share/wordnet
  fl-model evaluate --model tiny --spec spec.toml --data held-out.csv --adapter run.safetensors
  fl-model export-adapter --model tiny --spec spec.toml --adapter run.safetensors ./peft

Each verb has its own --help with examples.
TAB completes verbs and options: eval "$(register-python-argcomplete fl-model)"

exit codes: 0 success, 2 wrong arguments or a missing package, 14 model, 15 data, 70 a defect,
  74 the operating system said no, 130 Ctrl-C, 141 the output's reader left
"""


def parser() -> argparse.ArgumentParser:
    """The command line's parser."""
    top = argparse.ArgumentParser(
        prog="fl-model", description=__doc__, epilog=EXAMPLES, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_version(top)
    verbs = top.add_subparsers(dest="verb", required=True, metavar="VERB")

    def verb(
        name: str, run: Callable[[argparse.Namespace], dict[str, Any]], text: str, examples: str, more: str = ""
    ) -> argparse.ArgumentParser:
        made = verbs.add_parser(name, help=text)
        describe(made, text, examples, more)
        made.set_defaults(run=run)
        made.add_argument("--json", action="store_true", help="print one JSON object")
        add_quiet(made)
        return made

    build = verb(
        "build", _build, "build a base model from nothing",
        "fl-model build tiny --out ./tiny --wordnet /usr/share/wordnet",
        "It takes an hour or so on a CPU, and needs the extra 'demo' and WordNet.",
    )  # fmt: skip
    build.add_argument("name", choices=["tiny"])
    build.add_argument("--out", type=path, default=Path("tiny"), help="new folder (default: ./tiny)")
    build.add_argument("--steps", type=_positive, default=2200, help="pretraining steps (default: 2200)")
    build.add_argument("--wordnet", type=path, help="folder with WordNet's data.noun")
    quantize = verb(
        "quantize", _quantize, "quantise a Hugging Face MoE directory, tensor by tensor",
        "fl-model quantize ./OLMoE-1B-7B ./olmoe-int8\nfl-model quantize ./OLMoE-1B-7B ./olmoe-int4 --bits 4 --json",
    )  # fmt: skip
    quantize.add_argument("directory", type=path, help="the model's directory")
    quantize.add_argument("out", type=path, help="new folder")
    quantize.add_argument(
        "--bits", type=int, choices=[4, 8], default=8, help="8 (default), or 4: half the memory, larger errors"
    )
    inspect = verb(
        "inspect", _inspect, "parameters, active parameters a token, bytes, digest",
        "fl-model inspect tiny\nfl-model inspect ./OLMoE-1B-7B --json", "A run's spec names the digest.",
    )  # fmt: skip
    inspect.add_argument("directory", help="a model directory, or tiny")
    evaluate = verb(
        "evaluate", _evaluate, "accuracy on public data (nothing is accounted: never name private data)",
        "fl-model evaluate --spec spec.toml --data held-out.csv --adapter run.safetensors\n"
        "fl-model evaluate --model ./olmoe-int8 --spec spec.toml --data held-out.csv --zero-shot --json",
    )  # fmt: skip
    export = verb(
        "export-adapter", _export, "write a run's adapter as a PEFT directory",
        "fl-model export-adapter --spec spec.toml --adapter run.safetensors ./peft\n"
        "fl-model export-adapter --model ./olmoe-int8 --spec spec.toml --adapter run.safetensors ./peft --json",
    )  # fmt: skip
    for each in (evaluate, export):
        each.add_argument("--model", default="tiny", help="a model directory, or tiny (default)")
        each.add_argument("--spec", type=path, required=True, help="the run's spec")
        each.add_argument("--device", choices=["auto", "cpu", "cuda"], default="cpu", help="default: cpu")
    which = evaluate.add_mutually_exclusive_group(required=True)
    which.add_argument("--adapter", type=path, help="the run's adapter (safetensors)")
    which.add_argument("--zero-shot", action="store_true", help="no adapter: the nearest label title wins")
    evaluate.add_argument("--data", type=path, required=True, help="a table with public rows (CSV, JSONL, Parquet)")
    evaluate.add_argument("--text-column", default="text", help="default: text")
    evaluate.add_argument("--label-column", default="label", help="default: label")
    evaluate.add_argument("--titles", type=path, help="with --zero-shot: CSV with the columns label,title")
    export.add_argument("--adapter", type=path, required=True, help="the run's adapter (safetensors)")
    export.add_argument("out", type=path, help="new folder")
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
    facts(
        (name.replace("_", " "), f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value))
        for name, value in table.items()
    )


def _build(options: argparse.Namespace) -> dict[str, Any]:
    from fl_client.model.recipe.build import build_tiny

    return build_tiny(options.out, steps=options.steps, wordnet=options.wordnet, say=options.say)


def _quantize(options: argparse.Namespace) -> dict[str, Any]:
    from fl_client.model.inspect import inspect_directory
    from fl_client.model.quantise import quantise_directory

    report = quantise_directory(
        options.directory,
        options.out,
        options.bits,
        progress=lambda done, total: options.say("quantising", done, total),
    )
    options.say("hashing")
    return {
        "directory": str(options.out),
        "bytes_before": report.bytes_before,
        "bytes_after": report.bytes_after,
        "quantised_layers_ratio": round(report.quantised_after / report.quantised_before, 4),
        "digest": inspect_directory(options.out).digest,
    }


def _inspect(options: argparse.Namespace) -> dict[str, Any]:
    from fl_client.model.inspect import inspect_directory
    from fl_client.model.load import resolve

    options.say("reading and hashing the model")
    return inspect_directory(resolve(options.directory)).to_dict()


def _read_rows(path: Path, *columns: str) -> list[tuple[str, ...]]:
    from fl_client.data.tables import read_columns

    found = read_columns(path, list(columns))
    return list(zip(*(found[name] for name in columns), strict=True))


def _adapter(path: Path) -> dict[str, Any]:
    from fl_shared.adapters.safetensors import read_adapter, unpack

    return unpack(read_adapter(path))


def _evaluate(options: argparse.Namespace) -> dict[str, Any]:
    from fl_client.tasks.registry import task_of
    from fl_shared.documents.spec import RunSpec

    spec = RunSpec.from_toml(options.spec)
    rows = _read_rows(options.data, options.text_column, options.label_column)
    texts, known = [row[0] for row in rows], task_of(spec).accepted([row[1].strip() for row in rows])
    labels = [label for label in known if label is not None]
    if len(labels) < len(known):
        raise DataError(
            f"{options.data}: row {known.index(None) + 1} has a label that the spec has not "
            f"({len(known) - len(labels)} of {len(known)} rows)",
            fix="leave these rows out, or correct --label-column",
        )
    offset = {} if options.zero_shot else _adapter(options.adapter)
    options.say(f"loading the base model {options.model}")
    from fl_client.inference.predict import evaluate
    from fl_client.inference.zero_shot import evaluate_zero_shot
    from fl_client.model.load import load_model

    model = load_model(options.model, options.device)
    options.say(f"evaluating {len(texts)} rows")
    if options.zero_shot:
        pairs = _read_rows(options.titles, "label", "title") if options.titles else []
        result = evaluate_zero_shot(model, texts, labels, {row[0]: row[1] for row in pairs}, spec)
    else:
        result = evaluate(model, offset, texts, labels, spec)
    adapter = None if options.zero_shot else str(options.adapter)
    return {**result.figures, "n": result.n, "adapter": adapter}


def _export(options: argparse.Namespace) -> dict[str, Any]:
    from fl_client.site.files import require_empty
    from fl_shared.documents.spec import RunSpec

    require_empty(options.out)
    spec, offset = RunSpec.from_toml(options.spec), _adapter(options.adapter)
    options.say(f"loading the base model {options.model}")
    from fl_client.export.peft import export_peft
    from fl_client.model.load import load_model

    model = load_model(options.model, options.device)
    options.say(f"writing {options.out}, and loading it with PEFT")
    export_peft(model, spec, offset, options.out)
    return {"directory": str(options.out)}


def _run(argv: Sequence[str] | None) -> int:
    made = parser()
    complete(made)
    options = made.parse_args(argv)
    for extra in ("client", "demo") if options.verb == "build" else ("client",):
        require(extra)
    with working(f"{options.verb}: loading", quiet=options.quiet, json=options.json) as options.say:
        table = options.run(options)
    _print(options, table)
    return 0


def main() -> None:
    """The console script."""
    stay_offline()
    sys.exit(cli_main(_run))


if __name__ == "__main__":
    main()
