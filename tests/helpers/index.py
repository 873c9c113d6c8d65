"""Writes what the documents repeat from elsewhere: the index of decisions, the map of the house, first sentences.

`make index` rewrites them; the tests say when one is out of date. What is repeated by a program cannot drift.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = {"fl_client": "client", "fl_server": "server", "fl_shared": "shared"}
STATUS = re.compile(
    r"\*\*Status\.\*\* (?:Accepted(?:; amended by (?P<amended>\[.+))?|Superseded by (?P<by>\[.+)|Deprecated: .+)\."
)
_LINK = re.compile(r"\[(\d{4})\]\((\d{4})-[a-z0-9-]+\.md\)")


@dataclass(frozen=True)
class Decision:
    """One record: number, title without it, and its line of status ("" when it has none)."""

    path: Path
    number: str
    title: str
    status: str

    @property
    def others(self) -> list[str]:
        """The numbers that the status names: what superseded or amended it."""
        return [number for number, _ in _LINK.findall(self.status)]


def decisions(root: Path = ROOT) -> list[Decision]:
    """Every record below docs/decisions, by number; ValueError where the first line has another form."""
    records = []
    for path in sorted((root / "docs" / "decisions").glob("[0-9]*.md")):
        lines = path.read_text("utf-8").splitlines()
        head = re.fullmatch(r"# (\d{4}) (.+)", lines[0])
        if head is None or not path.name.startswith(head[1]):
            raise ValueError(f"{path.name}: the first line must be `# {path.name[:4]} Title`")
        status = next((line for line in lines[1:4] if line.startswith("**Status.**")), "")
        records.append(Decision(path, head[1], head[2], status))
    return records


def give_status(root: Path = ROOT) -> None:
    """Give records without a line of status the one that a new record has."""
    for record in decisions(root):
        if not record.status:
            title, _, rest = record.path.read_text("utf-8").partition("\n")
            record.path.write_text(f"{title}\n\n**Status.** Accepted.\n{rest}", "utf-8")


def between(text: str, name: str, body: str) -> str:
    """The text with `body` between `<!-- name -->` and `<!-- end of name -->`; ValueError without these marks."""
    begin, end = f"<!-- {name}: written by make index -->\n", f"<!-- end of {name} -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"the document needs the two marks of {name!r}: {begin.strip()} and {end}")
    before, _, rest = text.partition(begin)
    return f"{before}{begin}{body}{end}{rest.partition(end)[2]}"


def index_of_decisions(text: str) -> str:
    """docs/decisions/README.md with its table."""
    rows = [
        f"| [{record.number}]({record.path.name}) | {record.title} | {record.status.removeprefix('**Status.** ')} |\n"
        for record in decisions()
    ]
    return between(text, "index", "| number | decision | status |\n|---|---|---|\n" + "".join(rows))


def first_sentence(docstring: str) -> str:
    """Up to the first full stop before white space or the end, on one line."""
    words = " ".join(docstring.strip().split("\n\n")[0].split())
    found = re.match(r".*?(?<! al)(?<! e\.g)[.!?](?=\s|$)", words)
    return found[0] if found else words


def floors(package: str) -> list[list[str]]:
    """The rooms of each floor of a package, top to bottom, as its import contract has them; `(room)` arrives later."""
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["importlinter"]
    for contract in tool["contracts"]:
        if contract.get("containers") == [package]:
            return [[room.strip() for room in layer.split("|")] for layer in contract["layers"]]
    raise ValueError(f"pyproject.toml has no contract with the floors of {package}")


def room_sentence(package: str, room: str) -> str:
    """The first sentence of a room's docstring; of a room of brackets that has no folder yet, that it arrives later."""
    folder = ROOT / PACKAGES[package] / package
    places = (folder / room.strip("()") / "__init__.py", folder / f"{room.strip('()')}.py")
    for place in places:
        if place.exists():
            return first_sentence(ast.get_docstring(ast.parse(place.read_text("utf-8"))) or "")
    return "arrives later" if room.startswith("(") else "MISSING"


def rooms_inside(package: str, room: str) -> list[tuple[str, str]]:
    """The folders of code inside a room, each with its first sentence; schema migrations are none of a reader's."""
    folder = ROOT / PACKAGES[package] / package
    inner = sorted(path.parent.relative_to(folder) for path in (folder / room).glob("*/__init__.py"))
    return [(str(name), room_sentence(package, str(name))) for name in inner if name.name != "migrations"]


def rooms_on_disk(package: str) -> set[str]:
    """Folders and modules at a package's root that hold code."""
    folder = ROOT / PACKAGES[package] / package
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"}
    return modules | {path.parent.name for path in folder.glob("*/__init__.py")}


def map_of_the_house(text: str) -> str:
    """docs/architecture.md with its map."""
    drawn = []
    for package, part in PACKAGES.items():
        layers = floors(package)
        inside = {room: rooms_inside(package, room) for layer in layers for room in layer}
        wide = max(len(name) for room, inner in inside.items() for name in (room, *(name for name, _ in inner)))
        drawn.append(f"{package}  ({part}/{package})\n")
        for height, layer in zip(range(len(layers) - 1, -1, -1), layers, strict=True):
            for place, room in enumerate(layer):
                floor = f"{height:>3}" if place == 0 else "   "
                drawn.append(f"{floor}  {room:<{wide}}  {room_sentence(package, room)}\n")
                drawn.extend(f"     {name:<{wide}}  {sentence}\n" for name, sentence in inside[room])
        drawn.append("\n")
    return between(text, "map", "```\n" + "".join(drawn).rstrip() + "\n```\n")


def sentence_of(document: Path) -> str:
    """The first sentence below a document's title, without its links' targets and without emphasis."""
    body = document.read_text("utf-8").partition("\n")[2].strip()
    plain = re.sub(r"\[([^]]+)\]\([^)]+\)", r"\1", body).replace("**", "")
    return first_sentence(plain)


def paths_of_readers(text: str) -> str:
    """docs/README.md, where each `N. [name](document.md): ...` goes on with the document's first sentence."""

    def line(found: re.Match[str]) -> str:
        return f"{found[1]} {sentence_of(ROOT / 'docs' / found[2])}"

    return re.sub(r"(?m)^(\d+\. \[[^]]+\]\(([^)#]+\.md)\):).*$", line, text)


WRITTEN: dict[str, Callable[[str], str]] = {
    "docs/decisions/README.md": index_of_decisions,
    "docs/architecture.md": map_of_the_house,
    "docs/README.md": paths_of_readers,
}
"""The documents of which a part is written here."""


def main() -> int:
    """Rewrite the parts that are written here."""
    give_status()
    for name, written in WRITTEN.items():
        path = ROOT / name
        old = path.read_text("utf-8")
        new = written(old)
        if new != old:
            path.write_text(new, "utf-8")
            print(f"wrote {name}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
