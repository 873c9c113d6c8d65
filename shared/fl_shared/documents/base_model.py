"""What a site tells of its base model (digest and groups of layers, both public), and whether a run spec fits it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from fl_shared.declaration import Document
from fl_shared.documents.plan import Objection
from fl_shared.documents.spec import LORA_TARGETS, RunSpec
from fl_shared.fields import Choice, Digest, Texts


@dataclass(frozen=True)
class BaseModel(Document):
    """A base model: `sha256:<hex>` of its directory, and which of `LORA_TARGETS` it has."""

    WHERE: ClassVar = "base model"

    kind: Annotated[str, Choice(["base-model"])] = field(default="base-model", kw_only=True)
    digest: Digest
    targets: Annotated[tuple[str, ...], Texts(1, len(LORA_TARGETS), options=LORA_TARGETS)]

    def objection(self, spec: RunSpec) -> Objection | None:
        """Why no round of `spec` can run on this base model; None when it fits."""
        if other := other_base(spec, self.digest):
            return Objection("unknown-base-model", other)
        if absent := absent_targets(spec, self.targets):
            return Objection("unsupported-spec", absent)
        return None


def other_base(spec: RunSpec, model_digest: str) -> str:
    """Say that the run is for another base model than the site's; "" when it is not."""
    digest = spec.run.base_model
    return "" if digest == model_digest else f"the run is for base model {digest}, this site has {model_digest}"


def absent_targets(spec: RunSpec, targets: tuple[str, ...]) -> str:
    """Say which LoRA target the site's base model does not have; "" when it has all of them."""
    absent = [target for target in spec.lora.targets if target not in targets]
    if not absent:
        return ""
    return f"the base model has no {' and no '.join(absent)}; set [lora] targets to {', '.join(targets)}, or fewer"
