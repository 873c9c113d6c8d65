"""docs/journeys.md is true: every hop exists, and each one is called from a hop before it or says how it is reached."""

from __future__ import annotations

import contextlib
import inspect
import re
from dataclasses import dataclass
from pathlib import Path

import pytest

from helpers import index
from helpers.names import places_of, resolve

TEXT = (index.ROOT / "docs" / "journeys.md").read_text("utf-8")


@dataclass(frozen=True)
class Hop:
    """One line of a journey's table."""

    journey: str
    number: int
    name: str
    reached: str
    touches: str

    def __str__(self) -> str:
        return f"{self.journey}-{self.number}"


def hops() -> list[Hop]:
    """Every hop, in order."""
    found = []
    for section in TEXT.split("\n## ")[1:]:
        title, _, body = section.partition("\n")
        rows = [line for line in body.splitlines() if line.startswith("| `fl_")]
        for number, row in enumerate(rows, start=1):
            name, reached, _, touches = (cell.strip() for cell in row.strip("|").split("|"))
            found.append(Hop(title, number, name.strip("`"), reached, touches))
    return found


HOPS = hops()


def test_there_are_four_journeys_of_many_hops() -> None:
    """Record to update, launch to commit, budget to refusal, invitation to renewal."""
    journeys = [hop.journey for hop in HOPS]
    assert len(set(journeys)) == 4
    assert all(journeys.count(each) > 10 for each in journeys)


@pytest.mark.parametrize("hop", HOPS, ids=str)
def test_every_hop_exists(hop: Hop) -> None:
    """By import and by name; the message says where a function of that name is today."""
    try:
        resolve(hop.name)
    except AttributeError as error:
        pytest.fail(f"docs/journeys.md, {hop.journey}, hop {hop.number}: {error}")
    assert hop.touches, "say what it may touch, or write a dash"


@pytest.mark.parametrize("hop", HOPS, ids=str)
def test_every_hop_is_reached_as_it_says(hop: Hop) -> None:
    """`call`: the file of an earlier hop of the journey names it. A hop in backticks: it is an earlier one of these."""
    before = [each for each in HOPS if each.journey == hop.journey and each.number < hop.number]
    where = f"docs/journeys.md, {hop.journey}, hop {hop.number} ({hop.name})"
    for cited in re.findall(r"`(fl_[\w.]+)`", hop.reached):
        assert cited in {each.name for each in before}, f"{where}: {cited} is no hop before it"
    if hop.reached != "call":
        assert len(hop.reached.split()) > 1, f"{where}: say how it is reached"
        return
    last = hop.name.rpartition(".")[2]
    texts = []
    for each in before:
        with contextlib.suppress(AttributeError):  # that one is told by the test above
            texts.append(Path(inspect.getsourcefile(inspect.unwrap(resolve(each.name))) or "").read_text("utf-8"))
    assert any(re.search(rf"(?<!def )\b{last}\b", text) for text in texts), (
        f"{where}: no hop before it calls it any more; put the function between them, or take the hop out "
        f"({places_of(last)})"
    )
