"""The hospital scenario: three hospitals fine-tune one model together, and an auditor reads what it cost.

Each step is a command that a person would type. README.md beside this file explains.
"""

from __future__ import annotations

import argparse
import csv
import json
import shutil
import subprocess
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from fl_client.data.icd10 import chapter_titles, hospital_split
from harness import BIN, CommandError, Coordinator, Service, Site, command_json, environment, running

HERE = Path(__file__).resolve().parent
EPILOG = """examples:
  python scenarios/hospital/run.py                 the whole demo, output in scenarios/hospital/out
  python scenarios/hospital/run.py --rounds 2      a short one
  python scenarios/hospital/run.py --skip-alone    without the sites' own baselines
"""


def arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, epilog=EPILOG,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)  # fmt: skip
    parser.add_argument("--out", type=Path, default=HERE / "out", help="folder for everything that is written")
    parser.add_argument("--scenario", type=Path, default=HERE / "scenario.toml", help="the run's specification")
    parser.add_argument("--rounds", type=int, help="rounds instead of the scenario's")
    parser.add_argument("--skip-alone", action="store_true", help="leave out the sites' own baselines")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of a table")
    return parser.parse_args(argv)


def write_csv(path: Path, rows: Iterable[tuple[str, str]], header: tuple[str, str] = ("text", "chapter")) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as sink:
        writer = csv.writer(sink)
        writer.writerow(header)
        writer.writerows(rows)


def write_spec(source: Path, target: Path, *, base_model: str, rounds: int | None) -> dict[str, Any]:
    """Fill the scenario's placeholders in and write the spec that `fl-admin runs launch` takes."""
    text = source.read_text(encoding="utf-8").replace("@BASE_MODEL@", base_model)
    spec = tomllib.loads(text)
    if rounds is not None:
        text = text.replace(f"rounds = {spec['run']['rounds']}", f"rounds = {rounds}", 1)
        spec = tomllib.loads(text)
    target.write_text(text, encoding="utf-8")
    return spec


def accuracy(spec: Path, data: Path, adapter: Path | None) -> float:
    """Held-out accuracy, computed by `fl-model evaluate` on public data.

    Without an adapter: the base model alone, which picks the chapter whose title lies nearest.
    """
    titles = str(data.parent / "titles.csv")
    options = ["--zero-shot", "--titles", titles] if adapter is None else ["--adapter", str(adapter)]
    done = command_json("fl-model", "evaluate", "--model", "tiny", "--spec", str(spec), "--data", str(data),
                        "--text-column", "text", "--label-column", "chapter", *options, timeout=600)  # fmt: skip
    return float(done["accuracy"])


def watch(coordinator: Coordinator, run: str, *, quiet: bool) -> None:
    """`fl-admin runs watch`, straight to the terminal."""
    subprocess.run(
        [str(BIN / "fl-admin"), "runs", "watch", run, "--profile", coordinator.profile],
        env=environment(), check=False, stdout=sys.stderr if quiet else None,
    )  # fmt: skip


def wait_alone(console: Console, names: Sequence[str], services: Sequence[Service], rounds: int) -> None:
    """Wait for the `train-alone` processes: a bar for each on a terminal, a line for each round otherwise."""
    columns = (TextColumn("{task.description} alone"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as bars:
        tasks = [bars.add_task(name, total=rounds) for name in names]
        said = 0
        while True:
            ended = all(service.process is None or service.process.poll() is not None for service in services)
            done = [service.log.read_text(encoding="utf-8").count(" done; ") for service in services]
            for task, count in zip(tasks, done, strict=True):
                bars.update(task, completed=count)
            for number in range(said + 1, min(done) + 1):
                if not console.is_terminal:
                    console.print(f"alone: round {number} of {rounds} done at every hospital", soft_wrap=True)
                said = number
            if ended:
                break
            time.sleep(0.5)
    for service in services:
        if service.process is None or service.process.returncode != 0:
            service.check_alive()


def main(argv: Sequence[str] | None = None) -> int:
    options = arguments(argv)
    console = Console(stderr=options.json)
    out: Path = options.out.resolve()
    if out.exists() and not (out / ".scenario").exists() and any(out.iterdir()):
        console.print(f"[red]error:[/] {out} holds other files. Name an empty folder with --out.")
        return 2
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / ".scenario").touch()
    began = time.monotonic()

    def say(text: str) -> None:
        console.print(f"[dim]{time.monotonic() - began:6.1f} s[/]  {text}", soft_wrap=True)

    base = command_json("fl-model", "inspect", "tiny")["digest"]
    spec_path = out / "spec.toml"
    spec = write_spec(options.scenario, spec_path, base_model=base, rounds=options.rounds)
    names: list[str] = spec["run"]["sites"]

    train, test = hospital_split()
    write_csv(out / "data" / "held-out.csv", test)
    write_csv(out / "data" / "titles.csv", chapter_titles().items(), header=("label", "title"))
    for index, name in enumerate(names):
        write_csv(out / "data" / f"{name}.csv", train[index :: len(names)])
    majority = max(Counter(label for _, label in test).values()) / len(test)
    say(f"{len(train)} records at {len(names)} hospitals, {len(test)} held out (other categories)")

    coordinator = Coordinator(out)
    coordinator.init()
    coordinator.start()
    sites = [Site(name, out) for name in names]
    with running(coordinator.service):
        template = (HERE / "site.toml").read_text(encoding="utf-8")
        for site in sites:
            site.enroll(coordinator.url, coordinator.invite(site.id))
            site.configure(template.replace("@SITE@", site.id).replace("@SERVER@", coordinator.url)
                           .replace("@DATA@", str(out / "data" / f"{site.id}.csv")))  # fmt: skip
            site.check()
            say(f"{site.id} enrolled: own keys, own data, own ledger; fl-client check passes")

        alone: dict[str, Path] = {}
        if not options.skip_alone:
            say("each hospital alone, at the same budget …")
            services = []
            for site in sites:
                alone[site.id] = out / "alone" / f"{site.id}"
                services.append(site.train_alone(spec_path, alone[site.id]))
            with running(*services):
                wait_alone(console, names, services, spec["run"]["rounds"])
            say("each hospital alone: done")

        for site in sites:
            site.start()
        with running(*(site.service for site in sites)):
            run = coordinator.launch(spec_path)
            say(f"run {run} launched: {spec['run']['rounds']} rounds of {spec['run']['aggregation']}")
            watch(coordinator, run, quiet=options.json)
            shown = coordinator.wait(run, timeout=900)
            if shown["state"] != "completed":
                console.print(f"[red]error:[/] run {run} ended {shown['state']}: {shown.get('reason', '')}")
                console.print(f"logs: {out / 'logs'}")
                return 1
            adapter = out / "federated.safetensors"
            coordinator.admin("adapters", "export", run, "--out", str(adapter))

    held_out = out / "data" / "held-out.csv"
    results: dict[str, Any] = {
        "majority": majority,
        "base": accuracy(spec_path, held_out, None),
        "alone": {
            name: accuracy(spec_path, held_out, folder / "adapter.safetensors") for name, folder in alone.items()
        },
        "federated": accuracy(spec_path, held_out, adapter),
        "budgets": {site.id: site.audit("budgets") for site in sites},
        "spends": {site.id: site.audit("spends") for site in sites},
        "adapter": str(adapter),
        "seconds": round(time.monotonic() - began, 1),
    }
    (out / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    if options.json:
        print(json.dumps(results, indent=2))
    else:
        report(console, results, sites, out)
    return 0


def report(console: Console, results: dict[str, Any], sites: Sequence[Site], out: Path) -> None:
    """The closing tables."""
    table = Table(title="Held-out accuracy", caption="chapters of ICD-10 categories that no site holds",
                  title_justify="left", caption_justify="left")  # fmt: skip
    table.add_column("model", no_wrap=True)
    table.add_column("accuracy", justify="right")
    table.add_row("majority class", f"{results['majority']:.3f}")
    table.add_row("base model, zero-shot", f"{results['base']:.3f}")
    for name, value in results["alone"].items():
        table.add_row(f"{name} alone", f"{value:.3f}")
    table.add_row("[bold]federated[/]", f"[bold]{results['federated']:.3f}[/]")
    console.print(table)
    costs = Table(title="Privacy, from each site's own ledger", title_justify="left")
    costs.add_column("site", no_wrap=True)
    for column in ("alone", "together", "in all", "left", "delta"):
        costs.add_column(column if column == "delta" else f"epsilon {column}", justify="right")
    for site in sites:
        budget = results["budgets"][site.id]["budgets"][0]
        by_run = {row["run"]: row["epsilon"] for row in results["spends"][site.id]["runs"]}
        alone = [value for run, value in by_run.items() if run.startswith("alone")]
        together = [value for run, value in by_run.items() if not run.startswith("alone")]
        costs.add_row(
            site.id, *(f"{values[0]:.2f}" if values else "-" for values in (alone, together)),
            f"{budget['spent']:.2f}", f"{budget['left']:.2f}", f"{budget['delta']:g}",
        )  # fmt: skip
    console.print(costs)
    for line in (
        f"adapter  {results['adapter']}",
        *(f"ledger   {site.home / 'ledger.sqlite'}" for site in sites),
        f"logs     {out / 'logs'}",
        f"audit    fl-audit spends --site {sites[0].id} --home {sites[0].home}",
    ):
        console.print(line, soft_wrap=True)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except CommandError as failure:
        print(f"error: {failure}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        print("stopped: every process was ended; ledgers and adapters stay in the output folder",
              file=sys.stderr)  # fmt: skip
        sys.exit(130)
