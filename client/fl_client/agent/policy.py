"""What a site lets a round ask of it: the manifest's proposal held against `[policy]`.

A refusal names the field, the value that was asked and the limit. Both are public: the one comes from
the coordinator, the other from a configuration that holds no data.
"""

from __future__ import annotations

from collections.abc import Iterator

from fl_client.site.config import PolicyConfig
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import PolicyRefusal


def check_policy(spec: RunSpec, policy: PolicyConfig) -> None:
    """Raise PolicyRefusal when the spec asks for more than the policy allows."""
    for refusal in refusals(spec, policy):
        raise refusal


def refusals(spec: RunSpec, policy: PolicyConfig) -> Iterator[PolicyRefusal]:
    """Yield everything in the spec that the policy does not allow.

    `allow_non_private` (only accepted for data declared public) waives the four bounds of privacy; the
    ledger still records and gates the round.
    """
    asked = spec.training
    private = not policy.allow_non_private
    if private and asked.noise_multiplier < policy.min_noise_multiplier:
        yield _refusal("noise_multiplier", asked.noise_multiplier, "<", policy.min_noise_multiplier)
    for name, value, limit, applies in (
        ("clipping_norm", asked.clipping_norm, policy.max_clipping_norm, private),
        ("sampling_probability", asked.sampling_probability, policy.max_sampling_probability, private),
        ("steps_per_round", asked.steps_per_round, policy.max_steps_per_round, private),
        ("lora rank", spec.lora.rank, policy.max_rank, True),
    ):
        if applies and value > limit:
            yield _refusal(name, value, ">", limit)
    for target in spec.lora.targets:
        if target not in policy.targets:
            yield PolicyRefusal(
                f"lora target {target} is not among the site's targets ({', '.join(policy.targets)})",
                fix="launch the run with these targets, or ask the site to widen [policy] targets",
            )


def _refusal(name: str, asked: float, relation: str, limit: float) -> PolicyRefusal:
    return PolicyRefusal(
        f"{name} {asked:g} {relation} {limit:g}",
        fix=f"launch the run with {name} {'at least' if relation == '<' else 'at most'} {limit:g}",
    )
