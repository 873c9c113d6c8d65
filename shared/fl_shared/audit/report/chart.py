"""The burn-down curve: in the terminal, and as PNG or SVG through matplotlib (the extra `report`)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from fl_shared.audit.report.history import Point
from fl_shared.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_T = TypeVar("_T")
WIDTH = 48
ROWS = 12


def lines(ceiling: float, past: Sequence[Point], ahead: Sequence[tuple[int, float]]) -> Iterator[str]:
    """Yield the curve as lines of text: full bars for what is charged, light ones for rounds to come."""
    yield f"{'':22} 0{'epsilon':^{WIDTH - 2}}{ceiling:g}"
    for point in _thinned(past):
        label = f"{point.run[:14]} {point.round}"
        yield f"{label:>22} {_bar(point.epsilon / ceiling, '█')}| {point.epsilon:.3f}  {point.at[:10]}"
    for number, epsilon in _thinned([point for point in ahead if point[0]]):
        yield f"{f'+{number} rounds':>22} {_bar(epsilon / ceiling, '░')}| {epsilon:.3f}"


def _bar(share: float, mark: str) -> str:
    return (mark * round(WIDTH * min(1.0, share))).ljust(WIDTH)


def _thinned(points: Sequence[_T]) -> list[_T]:
    step = -(-len(points) // ROWS) or 1
    return [*points[:-1][::step], *points[-1:]]


def figure(title: str, ceiling: float, past: Sequence[Point], ahead: Sequence[tuple[int, float]]) -> Figure:
    """Return the curve."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 3.6), layout="constrained")
    axes = drawing.subplots()
    axes.step([0, *range(1, len(past) + 1)], [0.0, *(point.epsilon for point in past)], where="post", label="charged")
    if len(ahead) > 1:
        last = len(past)
        axes.plot([last + number for number, _ in ahead], [epsilon for _, epsilon in ahead], "--", label="this spec")
    axes.axhline(ceiling, color="black", linewidth=1, label="ceiling")
    axes.set(title=title, xlabel="charges", ylabel="epsilon", ylim=(0, 1.08 * ceiling))
    axes.legend(loc="lower right", frameon=False)
    return drawing


def burn_down(title: str, ceiling: float, past: Sequence[Point]) -> Figure:
    """Return both shares of a budget after each charge: epsilon of the ceiling, and the gate's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    drawing = Figure(figsize=(7, 3.0), layout="constrained")
    axes = drawing.subplots()
    at = range(len(past) + 1)
    axes.step(
        at, [0.0, *(point.epsilon / ceiling for point in past)], where="post", label="epsilon, share of the ceiling"
    )
    axes.step(
        at, [0.0, *(point.used for point in past)], "--", where="post", label="gate, share of its bound (decides)"
    )
    axes.axhline(1.0, color="black", linewidth=1)
    axes.set(title=title, xlabel=f"charges, {past[0].at[:10]} to {past[-1].at[:10]}", ylim=(0, 1.08))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.legend(loc="lower right", frameon=False)
    return drawing


def privacy_curve(title: str, curves: dict[str, list[tuple[float, float]]], at: float) -> Figure:
    """Return epsilon against delta, one line of (delta, epsilon) for each accountant, the budget's delta marked."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(7, 3.6), layout="constrained")
    axes = drawing.subplots()
    for label, points in curves.items():
        axes.plot([delta for delta, _ in points], [epsilon for _, epsilon in points], label=label)
    axes.axvline(at, color="black", linewidth=1, linestyle=":", label=f"delta {at:g}")
    axes.set(title=title, xlabel="delta", ylabel="epsilon", xscale="log")
    axes.legend(loc="upper right", frameon=False)
    return drawing


def draw(path: Path, title: str, ceiling: float, past: Sequence[Point], ahead: Sequence[tuple[int, float]]) -> None:
    """Write the curve to a new or existing PNG or SVG file; ConfigError for another ending."""
    if path.suffix not in {".png", ".svg"}:
        raise ConfigError(f"--out {str(path)!r} is no picture", fix="choose a name that ends in .png or .svg")
    figure(title, ceiling, past, ahead).savefig(path, dpi=150)
