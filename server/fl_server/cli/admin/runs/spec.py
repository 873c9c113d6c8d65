"""A run's spec as `fl-admin` sends it."""

from __future__ import annotations

from pathlib import Path

from fl_shared.documents.spec import RunSpec


def spec_text(path: Path | str) -> str:
    """The text of a spec file; ConfigError names the file, the field and the fix. The coordinator checks it again."""
    RunSpec.from_toml(Path(path))
    return Path(path).read_text("utf-8")
