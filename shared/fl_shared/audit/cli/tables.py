"""Tables that more than one verb prints."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fl_shared.cli.output import table


def show_runs(title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print runs as a table."""
    table(
        ("run", "data set", "rounds", "steps", "epsilon", "PLD", "delta", "then in all", "in doubt", "last"),
        [
            (
                row["run"],
                row["dataset"],
                str(row["rounds"]),
                str(row["steps"]),
                f"{row['epsilon']:.3f}",
                f"{row['epsilon_pld']:.3f}",
                f"{row['delta']:g}",
                f"{row['cumulative']:.3f}",
                str(row["in_doubt"]),
                row["last"][:19].replace("T", " "),
            )
            for row in rows
        ],
        title=title,
        right=("rounds", "steps", "epsilon", "PLD", "delta", "then in all", "in doubt"),
    )
