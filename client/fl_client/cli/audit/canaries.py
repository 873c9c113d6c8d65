"""`fl-audit canaries`: audit this installation's own training engine with canaries whose presence is known.

The engine trains once on made-up records, each put in by a fair coin, and the strongest guesser that the trust model
knows tells the coins from what was released (Steinke, Nasr and Jagielski 2023, arXiv 2305.08846). Better guesses than
the claimed epsilon allows accuse the engine. No private data is read and nothing is charged. For faults that such an
audit is too weak for, the engine's noise and sampler are tested against their distributions.

Gradient canaries stand in for units whose clipped gradient is one coordinate. Only a site can put them in; they reach
sampler, sum and noise alone, and thousands of them give the audit its power. Record canaries pass through everything.
Exit code 19 when the engine is accused, or refuses the model.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fl_shared.cli.extras import require
from fl_shared.cli.output import print_json, table, working
from fl_shared.cli.verbs import add_json, add_quiet, path
from fl_shared.documents.spec import LORA_TARGETS, LoraSection, RunSpec
from fl_shared.errors import ConfigError, EngineError, shown
from fl_shared.privacy.accounting import rdp_epsilon
from fl_shared.privacy.mechanism import Mechanism

if TYPE_CHECKING:
    from fl_client.dp.adapt import AdaptedModel
    from fl_client.dp.audit.canaries import CanaryReport
    from fl_client.dp.audit.distribution import DistributionResult
    from fl_client.tasks.task import Task

EXAMPLES = """
fl-audit canaries                                      # the shipped base model, a mechanism that audits well
fl-audit canaries --site hospital-001 --spec run.toml  # the site's model, a run's LoRA and mechanism
fl-audit canaries --canaries gradients --json --out canaries.json
fl-audit statement --site hospital-001 --empirical canaries.json --out statements
"""
ENOUGH = 0.95
TESTED_BELOW = ("no noise", "noise at half scale", "shuffled batches")
RECORD_CANARIES, GRADIENT_CANARIES, GRADIENT_GUESSES = 200, 20_000, 1000
MAX_STEPS = 100_000
DELTAS = (1e-12, 0.1)  # below, the accountant's own tails are no smaller; above, a claim is worth nothing
CONFIDENCES = (0.5, 0.999999)
MAX_EPSILON = 100.0  # what an audit can prove grows with the logarithm of its canaries: far below this


@dataclass(frozen=True)
class AuditSetup:
    """What is audited: model, adapter, task (of `spec`, or made up) and mechanism."""

    model: str
    device: str
    lora: LoraSection
    spec: RunSpec | None
    mechanism: Mechanism

    def task(self) -> Task:
        """The spec's task, or classification of 50 labels."""
        from fl_client.tasks.classification import Classification  # torch
        from fl_client.tasks.registry import task_of

        return Classification(tuple(map(str, range(50))), 32) if self.spec is None else task_of(self.spec)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add this verb's options."""
    parser.add_argument("--site", help="audit with this site's base model and device")
    parser.add_argument("--home", metavar="DIR", type=path, help="its directory [FL_CLIENT_HOME]")
    parser.add_argument("--model", metavar="DIR", help="a base model instead of the site's (default: tiny)")
    parser.add_argument("--spec", metavar="FILE", type=path, help="take LoRA, task and mechanism of this run's spec")
    parser.add_argument("--canaries", choices=("records", "gradients", "both"), default="both", help="default: both")
    parser.add_argument("--count", type=_even, help="number of canaries (default: 200 records, 20000 gradients)")
    parser.add_argument("--guesses", type=_even, help="fixed beforehand (default: half the records, 1000 gradients)")
    parser.add_argument("--noise-multiplier", type=float, metavar="SIGMA", help="default: the spec's, or 3")
    parser.add_argument("--sampling-probability", type=float, metavar="Q", help="default: the spec's, or 1")
    parser.add_argument("--steps", type=int, help=f"at most {MAX_STEPS} (default: all of the spec's run, or 1)")
    parser.add_argument("--delta", type=float, default=1e-5, help="of the claim, 1e-12 to 0.1 (default: 1e-5)")
    parser.add_argument(
        "--confidence", type=float, default=0.95, help="of all audits together, 0.5 to 0.999999 (default: 0.95)"
    )
    parser.add_argument("--out", metavar="FILE", type=path, help="write the JSON result, for `statement --empirical`")
    add_quiet(parser)
    add_json(parser)


def _even(text: str) -> int:
    value = int(text) if text.isascii() and text.isdigit() and len(text) < 16 else 0
    if value < 2 or value % 2:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not a positive even number")
    return value


def setup_of(arguments: argparse.Namespace) -> AuditSetup:
    """What the arguments, the site's configuration and the spec ask for together; ConfigError when they are wrong."""
    model, device = arguments.model or "tiny", "cpu"
    if arguments.site:
        from fl_client.site.config import SiteConfig
        from fl_client.site.home import SiteHome

        config = SiteConfig.load(SiteHome.locate(arguments.site, arguments.home), arguments.site)
        model, device = arguments.model or str(config.model.directory), config.model.device
    spec = None if arguments.spec is None else RunSpec.from_toml(arguments.spec)
    if spec is not None:
        per_round, lora = spec.mechanism(), spec.lora
        sigma, q, steps, norm = (
            per_round.noise_multiplier, per_round.sampling_probability, per_round.steps * spec.run.rounds,
            per_round.clipping_norm,
        )  # fmt: skip
    else:
        lora = LoraSection(rank=4, alpha=4.0, targets=LORA_TARGETS)
        sigma, q, steps, norm = 3.0, 1.0, 1, 1.0
    for name, value, (low, high) in (
        ("--delta", arguments.delta, DELTAS),
        ("--confidence", arguments.confidence, CONFIDENCES),
    ):
        if not low <= value <= high:
            raise ConfigError(
                f"{name} {value!r} does not lie between {low:g} and {high:g}",
                fix="e.g. --confidence 0.95 --delta 1e-5",
            )
    _check_place(arguments.out)
    sigma = sigma if arguments.noise_multiplier is None else arguments.noise_multiplier
    q = q if arguments.sampling_probability is None else arguments.sampling_probability
    steps = steps if arguments.steps is None else arguments.steps
    if not 1 <= steps <= MAX_STEPS:
        raise ConfigError(f"an audit of {steps} steps", fix=f"give --steps from 1 to {MAX_STEPS}")
    mechanism = Mechanism(sigma, q, steps, norm)
    claimed = rdp_epsilon([mechanism], arguments.delta)
    if not claimed <= MAX_EPSILON:
        raise ConfigError(
            f"noise {sigma:g}, q {q:g} and {steps} steps claim epsilon {claimed:.3g}, which no audit can contradict",
            fix=f"audit a mechanism below epsilon {MAX_EPSILON:g}: give --noise-multiplier or --steps",
        )
    return AuditSetup(model, device, lora, spec, mechanism)


def _check_place(out: Path | None) -> None:
    """ConfigError when the result could not be written there, before minutes of work."""
    if out is None:
        return
    if out.is_dir() or not out.parent.is_dir() or not os.access(out if out.exists() else out.parent, os.W_OK):
        raise ConfigError(f"--out {out} cannot be written", fix="name a file in a directory that exists")


def run(arguments: argparse.Namespace) -> int:
    """Audit, print, and say whether the engine is accused."""
    require("client")
    setup = setup_of(arguments)
    with working("loading the engine", quiet=arguments.quiet, json=arguments.json) as say:
        result = audit(setup, arguments, say)
    lost = _write(result, arguments.out)
    if arguments.json:
        print_json(result)
    else:
        _show(result)
    if lost is not None and not result["accused"]:
        raise lost
    if lost is not None:  # an accusation is not to be hidden by a full disk
        print(f"error: {lost.message}", file=sys.stderr)
    return EngineError.exit_code if result["accused"] else 0


def _write(result: dict[str, Any], out: Path | None) -> ConfigError | None:
    """Write the result; what went wrong is for after it was printed."""
    if out is not None:
        try:
            out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        except OSError as error:
            return ConfigError(f"{out}: {error.strerror}", fix="keep what was printed")
    return None


def audit(
    setup: AuditSetup, arguments: argparse.Namespace, progress: Callable[[str, int, int], None]
) -> dict[str, Any]:
    """Run the audits that were asked for, and the two tests; plain JSON values."""
    import numpy as np
    import torch

    from fl_client.dp.adapt import adapt
    from fl_client.dp.audit.canaries import worst_case_adapter
    from fl_client.dp.audit.distribution import FALSE_ALARM, check_distributions
    from fl_client.model.load import load_model

    torch.set_num_threads(1)
    progress("model", 0, 1)
    model = load_model(setup.model, setup.device)
    adapted = adapt(model.module, setup.lora, setup.task().objective, model.feature_mean, model.feature_std)
    _check_grid(setup.mechanism, adapted)
    worst_case_adapter(adapted, np.random.default_rng())
    progress("model", 1, 1)
    kinds = ("records", "gradients") if arguments.canaries == "both" else (arguments.canaries,)
    sizes = {kind: _sizes(kind, arguments, adapted) for kind in kinds}
    confidence = 1 - (1 - arguments.confidence) / len(kinds)  # together they accuse a right engine no more often
    reports = []
    for kind in kinds:
        prefixed = functools.partial(_prefixed, progress, kind)
        reports.append(
            _audit_one_kind(
                kind, setup, adapted, arguments, sizes[kind], confidence, int(model.config["vocab_size"]), prefixed
            )
        )
    tests = check_distributions(adapted, setup.mechanism)
    return _result(setup, model.digest, arguments, reports, tests, FALSE_ALARM)


def _prefixed(progress: Callable[[str, int, int], None], kind: str, stage: str, done: int, total: int) -> None:
    progress(f"{kind}: {stage}", done, total)


def _check_grid(mechanism: Mechanism, adapted: AdaptedModel) -> None:
    """ConfigError when the engine has no noise so strong for so many coordinates."""
    from fl_client.dp.mechanism.noise import choose_grid

    try:
        choose_grid(
            clipping_norm=mechanism.clipping_norm,
            noise_multiplier=mechanism.noise_multiplier,
            dimensions=adapted.dimensions,
            slack=0.0,
        )
    except EngineError as error:
        raise ConfigError(error.message, fix=error.fix) from error


def _sizes(kind: str, arguments: argparse.Namespace, adapted: AdaptedModel) -> tuple[int, int]:
    """Canaries and guesses of one kind; ConfigError when there cannot be so many."""
    from fl_client.dp.audit.canaries import most_records

    most = adapted.dimensions if kind == "gradients" else most_records(adapted)
    default = min(GRADIENT_CANARIES if kind == "gradients" else RECORD_CANARIES, max(2, most // 2 * 2))
    count = arguments.count or default
    if count > most:
        why = "they have one coordinate each" if kind == "gradients" else "their gradients must fit into memory"
        raise ConfigError(
            f"--count {count}: with {adapted.dimensions} coordinates there can be {most} {kind[:-1]} canaries, "
            f"because {why}",
            fix=f"take fewer, or a {'larger' if kind == 'gradients' else 'smaller'} LoRA rank; --canaries picks a kind",
        )
    guesses = arguments.guesses or (min(GRADIENT_GUESSES, count) if kind == "gradients" else max(2, count // 4 * 2))
    if guesses > count:
        raise ConfigError(f"--guesses {guesses} for {count} {kind[:-1]} canaries", fix=f"guess at most {count}")
    return count, guesses


def _audit_one_kind(
    kind: str,
    setup: AuditSetup,
    adapted: AdaptedModel,
    arguments: argparse.Namespace,
    size: tuple[int, int],
    confidence: float,
    vocabulary: int,
    progress: Callable[[str, int, int], None],
) -> CanaryReport:
    import numpy as np

    from fl_client.dp.audit.canaries import audit_gradients, audit_records, random_records

    count, guesses = size
    if kind == "gradients":
        return audit_gradients(
            adapted, setup.mechanism,
            canaries=count, guesses=guesses, delta=arguments.delta, confidence=confidence, progress=progress,
        )  # fmt: skip
    task = setup.task()
    records = random_records(
        count, vocabulary=vocabulary, tokens=task.max_tokens, objective=task.objective, rng=np.random.default_rng()
    )
    return audit_records(
        adapted, records, setup.mechanism,
        guesses=guesses, delta=arguments.delta, confidence=confidence, progress=progress,
    )  # fmt: skip


def _result(
    setup: AuditSetup,
    digest: str,
    arguments: argparse.Namespace,
    reports: list[CanaryReport],
    tests: list[DistributionResult],
    false_alarm: float,
) -> dict[str, Any]:
    return {
        "kind": "canary-audit",
        "made_at": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_model": digest,
        "noise_multiplier": setup.mechanism.noise_multiplier,
        "sampling_probability": setup.mechanism.sampling_probability,
        "steps": setup.mechanism.steps,
        "clipping_norm": setup.mechanism.clipping_norm,
        "delta": arguments.delta,
        "claimed_epsilon": reports[0].claimed_epsilon,
        "epsilon_lower": max(report.result.epsilon_lower for report in reports),
        "confidence": arguments.confidence,
        "accused": any(report.accused for report in reports) or any(test.accused for test in tests),
        "audits": [report.to_dict() for report in reports],
        "distributions": [asdict(test) | {"false_alarm": false_alarm} for test in tests],
    }


def _caught_otherwise(fault: str) -> str:
    """What catches a fault that this audit is too small for."""
    return "no: tested below" if fault in TESTED_BELOW else "no: take more canaries"


def _show(result: dict[str, Any]) -> None:
    mechanism = (
        f"noise {result['noise_multiplier']:g}, q {result['sampling_probability']:g}, {result['steps']} steps, "
        f"clipping {result['clipping_norm']:g}"
    )
    print(f"claimed: epsilon {result['claimed_epsilon']:.3f} at delta {result['delta']:g} ({mechanism})")
    audits = result["audits"]
    table(
        ("canaries", "number", "guessed", "right", "epsilon at least", "this audit can prove", "verdict"),
        [
            (
                a["kind"], str(a["canaries"]), str(a["guesses"]), str(a["correct"]), f"{a['epsilon_lower']:.3f}",
                f"at most {a['best_possible']:.3f}", "ACCUSED" if a["accused"] else "not accused",
            )
            for a in audits
        ],
        title=f"lower bounds on epsilon, together at confidence {result['confidence']:g}",
        right=("number", "guessed", "right", "epsilon at least", "this audit can prove"),
    )  # fmt: skip
    faults = [name for name in audits[0]["power"] if name != "none"]
    table(
        ("fault", *(a["kind"] for a in audits), "enough?"),
        [
            (
                fault, *(f"{a['power'][fault]:.2f}" for a in audits),
                "yes" if max(a["power"][fault] for a in audits) >= ENOUGH else _caught_otherwise(fault),
            )
            for fault in faults
        ],
        title="chance that an audit of this size accuses an engine with a fault",
        right=[a["kind"] for a in audits],
    )  # fmt: skip
    table(
        ("part", "p-value", "accused below", "verdict"),
        [
            (t["name"], f"{t['p_value']:.3g}", f"{t['false_alarm']:g}", "ACCUSED" if t["accused"] else "not accused")
            for t in result["distributions"]
        ],
        title="tests of the distributions, for faults that no audit of this size can prove",
        right=("p-value", "accused below"),
    )
    print("the engine is ACCUSED: do not train with it" if result["accused"] else "nothing accuses the engine")
