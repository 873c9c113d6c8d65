"""Compare a run spec with the base models that its sites have announced, before anything runs.

Announcements come from the sites (`POST /v1/base` of the gateway). They spare a run that cannot work from being
launched, and decide nothing: a site refuses a round that does not fit its base model, whatever it has announced.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

from fl_server.db.models import SiteRow
from fl_shared.documents.base_model import BaseModel
from fl_shared.documents.plan import Objection
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import RunError

MAX_EXPLANATION = 2500
"""Characters of one message; gRPC carries 8 KiB of details."""


def announced(row: SiteRow) -> BaseModel | None:
    """What a site has announced last; None when it has announced nothing since its enrolment."""
    return BaseModel(row.base_model, tuple(row.base_targets.split(","))) if row.base_model else None


@dataclass
class Fit:
    """How a spec fits the base models of its sites. `silent` have announced nothing."""

    spec: RunSpec
    bases: dict[str, BaseModel] = field(default_factory=dict)
    objections: dict[str, Objection] = field(default_factory=dict)
    silent: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, spec: RunSpec, rows: Iterable[SiteRow]) -> Fit:
        """Compare the spec with what each site has announced."""
        fit = cls(spec)
        for row in rows:
            base = announced(row)
            if base is None:
                fit.silent.append(row.site)
                continue
            fit.bases[row.site] = base
            if objection := base.objection(spec):
                fit.objections[row.site] = objection
        return fit

    def require(self) -> None:
        """RunError that names each site that does not fit, what differs and the fix; nothing when all fit."""
        if self.objections:
            raise RunError(
                f"the spec does not fit the base models: {self._explanation()}", fix=self._fix(), code="unfit-spec"
            )

    def warnings(self) -> tuple[str, ...]:
        """What a launch says all the same: who did not fit, and of whom nothing is known."""
        warnings = []
        if self.objections:
            warnings.append(f"launched though the spec does not fit the base models: {self._explanation()}")
        if self.silent:
            warnings.append(f"not compared, since no base model was announced yet: {_names(self.silent)}")
        return tuple(warnings)

    def _explanation(self) -> str:
        by_reason: dict[str, list[str]] = {}
        for site, objection in self.objections.items():
            by_reason.setdefault(objection.message, []).append(site)
        text = "; ".join(f"{_names(sites)}: {why}" for why, sites in by_reason.items())
        return (
            text if len(text) <= MAX_EXPLANATION else f"{text[:MAX_EXPLANATION]}... (all of them: `fl-admin runs plan`)"
        )

    def _fix(self) -> str:
        fixes = []
        digests = sorted({base.digest for base in self.bases.values()})
        if any(objection.code == "unknown-base-model" for objection in self.objections.values()):
            fixes.append(
                f"set [run] base_model to {digests[0]}, which these sites have"
                if len(digests) == 1
                else "give these sites the run's base model, or take them out of [run] sites"
            )
        usable = [
            self.bases[site].targets
            for site, objection in self.objections.items()
            if objection.code == "unsupported-spec" or len(digests) == 1
        ]
        common = [target for target in self.spec.lora.targets if all(target in targets for targets in usable)]
        if len(common) < len(self.spec.lora.targets):
            fixes.append(
                f"set [lora] targets to {', '.join(common)}"
                if common
                else "name [lora] targets that every base model has (`fl-admin sites list --json`)"
            )
        return f"{'; '.join(fixes)}; --force launches all the same, and these sites refuse their rounds"


def _names(sites: list[str]) -> str:
    """Names for a sentence: the first twenty, and how many more."""
    more = len(sites) - 20
    return ", ".join(sites[:20]) + (f" and {more} more" if more > 0 else "")
