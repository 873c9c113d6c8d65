"""One run of a whole federation, killed with kill -9 at random places, as often as one likes.

    python tests/benchmarks/chaos.py --kills 50 --seed 1 --json    fifty kills, about half an hour on 2 cores
    python tests/benchmarks/chaos.py --kills 8 --sites 2           a short one

A coordinator on PostgreSQL and sites with real agents, ledgers and the shipped model are started as processes.
In every round some components die, one at a time; each turn draws the next one from a bag that holds every
component once. Usually the next kill waits until all is well again; sometimes, and when the run gets ahead of the
kills, it does not. At the end the
coordinator's SQL, the sites' ledgers, the adapters and a copy of every stored update are held against the
promises (`helpers.chaos.judge`). Prints one report; exit code 1 when something did not hold.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parents[2] / "scenarios")]

from harness import CommandError  # noqa: E402 - run by hand, where nobody has set the path
from helpers.chaos import Federation, Killer, bag, judge, until  # noqa: E402 - same

RUN = "chaos"
BEHIND = 4.0  # kills that are owed, from which on none waits


def say(text: str) -> None:
    """Tell on stderr how it goes."""
    print(f"{time.strftime('%H:%M:%S')} {text}", file=sys.stderr, flush=True)


def carry_on(federation: Federation, report: dict[str, Any]) -> None:
    """A run that has failed is resumed as an admin would; the report counts how often."""
    row = federation.run_row(RUN)
    if row.state == "failed":
        say(f"resumed by hand: {row.reason}")
        report["resumed_by_hand"].append(row.reason)
        federation.coordinator.admin("runs", "resume", RUN)


def torment(
    federation: Federation, killer: Killer, chance: random.Random, options: argparse.Namespace, report: dict[str, Any]
) -> None:
    """Kill until the number is reached; rounds set the pace, not the clock."""
    names = bag(options.components, chance)
    done, rounds = 0, options.rounds
    recoveries: dict[str, list[float]] = {name: [] for name in options.components}
    while done < options.kills:
        row = federation.run_row(RUN)
        if row.state == "completed":
            break
        carry_on(federation, report)
        due = options.kills * (row.committed + 1) / max(rounds - 2, 1)
        if done >= due:
            time.sleep(0.3)
            continue
        time.sleep(chance.uniform(0.0, 8.0))
        name = next(names)
        began = time.monotonic()
        if not killer.kill(name):
            say(f"no {name} lived just now")
            continue
        done += 1
        hurry = chance.random() < options.haste or due - done > BEHIND
        if not hurry:
            try:
                until(lambda: federation.is_well(RUN), f"all is well after the death of {name}")
            except AssertionError as error:
                carry_on(federation, report)
                say(str(error))
            recoveries[name].append(time.monotonic() - began)
        manner = ", in haste" if hurry else ""
        say(f"kill {done} of {options.kills}: {name} in round {row.committed + 1} of {rounds}{manner}")
    report["recovery_s_median"] = {
        name: round(sorted(found)[len(found) // 2], 1) for name, found in recoveries.items() if found
    }


def stop(*_: object) -> None:
    """End everything that was started, undisturbed by a second signal."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    sys.exit(143)


def main() -> int:
    """Run it and print the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50, help="kill -9 so often (default 50)")
    parser.add_argument("--quick", action="store_true", help="2 kills, 2 sites: a minute or two")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--sites", type=int, default=3, help="sites, each with a real agent")
    parser.add_argument("--quorum", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help="0: one for each kill")
    parser.add_argument("--haste", type=float, default=0.2, help="share of kills that the next one does not wait for")
    parser.add_argument("--components", nargs="+", choices=Killer.NAMES, default=list(Killer.NAMES))
    parser.add_argument("--keep", action="store_true", help="leave all files where they are, and say where")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    if options.quick:
        options.kills, options.sites = 2, 2
    options.rounds = options.rounds or max(4, options.kills)
    options.quorum = min(options.quorum, options.sites)
    signal.signal(signal.SIGTERM, stop)
    chance = random.Random(options.seed)
    report: dict[str, Any] = {
        "seed": options.seed, "sites": options.sites, "quorum": options.quorum, "rounds": options.rounds,
        "haste": options.haste,
        "machine": f"{platform.machine()}, python {platform.python_version()}", "resumed_by_hand": [],
    }  # fmt: skip
    root = Path(tempfile.mkdtemp(prefix="ch-"))
    began = time.monotonic()
    federation = Federation(root, [f"hospital-{number:03d}" for number in range(1, options.sites + 1)])
    try:
        say(f"starting a coordinator and {options.sites} sites at {root}")
        federation.up()
        federation.launch(RUN, rounds=options.rounds, quorum=options.quorum)
        killer = Killer(federation, RUN, chance)
        torment(federation, killer, chance, options, report)
        say("no more kills; waiting for the end of the run")

        def over() -> bool:
            carry_on(federation, report)
            return bool(federation.run_row(RUN).state == "completed")

        until(over, "the run completed", 1800.0)
        verdict = judge(federation, RUN, options.rounds)
    except (AssertionError, CommandError) as error:
        say(str(error))
        options.keep = True
        return 1
    finally:
        federation.close()
        if options.keep:
            say(f"kept {root}")
        else:
            shutil.rmtree(root, ignore_errors=True)
    kills = sum(killer.killed.values())
    verdict.require("as many kills as asked for", kills >= options.kills, f"{kills} of {options.kills}")
    report |= {
        "kills": kills, "kills_by_component": killer.killed, "seconds": round(time.monotonic() - began),
        **verdict.figures, "checks": verdict.checks, "problems": verdict.problems,
    }  # fmt: skip
    if options.json:
        print(json.dumps(report, indent=2))
    else:
        print(f"{kills} kills, {options.rounds} rounds, {sum(verdict.checks.values())} checks")
        print("\n".join(verdict.problems) or "every promise held")
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
