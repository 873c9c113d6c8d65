"""The coordinator's change of its signing key, signed with the old key."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from fl_shared.declaration import Document
from fl_shared.fields import Choice, Text, Time


@dataclass(frozen=True)
class CoordinatorKey(Document):
    """The coordinator signs with `new_key` (hex) from `created_at` on; the old one is accepted until `old_until`."""

    WHERE: ClassVar = "rotation"

    kind: Annotated[str, Choice(["coordinator-key"])] = field(default="coordinator-key", kw_only=True)
    new_key: Text
    created_at: Time
    old_until: Time
