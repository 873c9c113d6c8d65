"""What a site tells of its base model (digest and groups of layers, both public), and whether a run spec fits it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from fl_shared.documents.manifest import LORA_TARGETS, RunSpec, check_digest
from fl_shared.documents.plan import Objection
from fl_shared.fields import Fields


@dataclass(frozen=True, slots=True)
class BaseModel:
    """A base model: `sha256:<hex>` of its directory, and which of `LORA_TARGETS` it has."""

    digest: str
    targets: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return {"kind": "base-model", "digest": self.digest, "targets": list(self.targets)}

    @classmethod
    def from_dict(cls, table: Any) -> BaseModel:
        """Read and check an announcement; ConfigError on anything else."""
        f = Fields(table, "base model")
        f.choice("kind", ["base-model"])
        made = cls(f.named("digest", check_digest), f.texts("targets", high=len(LORA_TARGETS)))
        for target in made.targets:
            if target not in LORA_TARGETS:
                raise f.fail("targets", f"names {target[:80]!r}", f"choose from {', '.join(LORA_TARGETS)}")
        f.done()
        return made

    def objection(self, spec: RunSpec) -> Objection | None:
        """Why no round of `spec` can run on this base model; None when it fits."""
        if other := other_base(spec, self.digest):
            return Objection("unknown-base-model", other)
        if absent := absent_targets(spec, self.targets):
            return Objection("unsupported-spec", absent)
        return None


def other_base(spec: RunSpec, model_digest: str) -> str:
    """Say that the run is for another base model than the site's; "" when it is not."""
    asked = spec.run.base_model
    return "" if asked == model_digest else f"the run is for base model {asked}, this site has {model_digest}"


def absent_targets(spec: RunSpec, targets: tuple[str, ...]) -> str:
    """Say which LoRA target the site's base model does not have; "" when it has all of them."""
    absent = [target for target in spec.lora.targets if target not in targets]
    if not absent:
        return ""
    return f"the base model has no {' and no '.join(absent)}; set [lora] targets to {', '.join(targets)}, or fewer"
