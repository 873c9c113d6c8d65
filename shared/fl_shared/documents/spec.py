"""The run spec: one federated training as an admin asks for it, in a TOML file and inside signed documents."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from fl_shared.adapters.safetensors import WIRES
from fl_shared.declaration import Digested, Document
from fl_shared.documents.aggregators import AGGREGATIONS, AGGREGATORS, Parameters, check_quorum, read_parameters
from fl_shared.errors import ConfigError
from fl_shared.fields import Between, Choice, Digest, FieldError, OneOf, RunName, Texts, Whole
from fl_shared.names import NAME, site_id
from fl_shared.privacy.mechanism import LEAST_CLIPPING_NORM, LEAST_NOISE, LEAST_SAMPLING, MOST_NOISE, Mechanism
from fl_shared.toml import load_toml, parse_toml

LORA_TARGETS = ("attention", "shared_experts", "routed_experts")
MOST_ROUNDS = 100_000
SECONDS_OF_A_WEEK = 7 * 86_400


@dataclass(frozen=True)
class RunSection(Document):
    """[run]: who takes part, how replies become one adapter, and in what form updates travel."""

    name: RunName
    """The run's name: lower-case letters, digits and hyphens."""
    base_model: Digest
    """The base model's digest, as `fl-model inspect` prints it."""
    sites: Annotated[tuple[str, ...], Texts(1, 10_000, check=site_id, pattern=f"^{NAME}$")]
    """The sites that take part, by name."""
    rounds: Annotated[int, Whole(1, MOST_ROUNDS)]
    """How many rounds are trained."""
    quorum: Annotated[int, Whole(1, 10_000)]
    """How many sites must answer for a round to be accepted; at most as many as there are sites."""
    round_timeout_s: Annotated[float, Between(1, SECONDS_OF_A_WEEK)] = 600.0
    """Seconds after which a round no longer waits for answers."""
    aggregation: Annotated[str, Choice(AGGREGATIONS)] = "fedavg"
    """How updates become the next adapter; its parameters stand in [aggregation]."""
    wire: Annotated[str, Choice(WIRES)] = "float32"
    """How the values of updates travel."""

    def checked(self) -> Self:
        """The quorum is reached by the sites that are named."""
        if self.quorum > len(self.sites):
            raise FieldError("quorum", f"is {self.quorum}", f"write a whole number from 1 to {len(self.sites)}")
        return self


@dataclass(frozen=True)
class TaskSection(Document):
    """[task]: what is learnt. The label set is public; its order fixes the head's rows."""

    kind: Annotated[str, Choice(["classification"])]
    """The kind of task."""
    labels: Annotated[tuple[str, ...], Texts(2, 10_000)]
    """The labels, in the order of the head's rows."""
    max_tokens: Annotated[int, Whole(1, 131_072)]
    """Tokens of a record beyond which it is cut."""


@dataclass(frozen=True)
class LoraSection(Document):
    """[lora]: rank, alpha and the groups of layers that are adapted (Hu et al. 2021, arXiv 2106.09685)."""

    STATED: ClassVar = ("targets",)

    rank: Annotated[int, Whole(1, 1024)]
    """The rank of the adapter."""
    alpha: Annotated[float, Between(0, 1e6, above=True)] = 0.0
    """The adapter's scale is alpha / rank; left out, it is twice the rank."""
    targets: Annotated[tuple[str, ...], Texts(1, len(LORA_TARGETS), options=LORA_TARGETS)] = ()
    """The groups of layers that are adapted."""

    def checked(self) -> Self:
        """Alpha is twice the rank where it was left out."""
        return self if self.alpha else dataclasses.replace(self, alpha=2.0 * self.rank)


@dataclass(frozen=True)
class TrainingSection(Document):
    """[training]: a proposal. The site's policy has the last word."""

    noise_multiplier: Annotated[float, Between(LEAST_NOISE, MOST_NOISE)]
    """The noise's standard deviation over the clipping norm."""
    clipping_norm: Annotated[float, Between(LEAST_CLIPPING_NORM, 1e12)]
    """The bound on the L2 norm of what one privacy unit contributes."""
    sampling_probability: Annotated[float, Between(LEAST_SAMPLING, 1)]
    """Each privacy unit's chance to be in a step."""
    steps_per_round: Annotated[int, Whole(1, 1_000_000)]
    """Optimizer steps of each site in a round."""
    learning_rate: Annotated[float, Between(0, 1e6, above=True)]
    """The learning rate of the adapter."""
    head_learning_rate: Annotated[float, Between(0, 1e6, above=True)]
    """The learning rate of the classification head."""
    momentum: Annotated[float, Between(0, 1, below=True)] = 0.9
    """The momentum of a site's optimizer."""
    seed_adapter: Annotated[int, Whole(0, 2**63 - 1)] = 0
    """The seed of the adapter's first values, which are public."""


@dataclass(frozen=True)
class RunSpec(Digested):
    """One federated training, as an admin asks for it. `aggregation`: the aggregator's parameters, by name."""

    WHERE: ClassVar = "spec"
    SECTIONS: ClassVar = True

    run: RunSection
    task: TaskSection
    lora: LoraSection
    training: TrainingSection
    aggregation: Annotated[Parameters, OneOf(tuple(AGGREGATORS.values()))] = ()
    """Parameters of the aggregator that `[run] aggregation` names."""

    @classmethod
    def from_toml(cls, path: Path) -> RunSpec:
        """Read and check a spec file; ConfigError names file, field, value and fix."""
        return cls.from_dict(load_toml(path), where=str(path))

    @classmethod
    def from_text(cls, text: str, *, where: str = "spec") -> RunSpec:
        """Read and check a spec's TOML text, as it comes over the wire; ConfigError as in `from_toml`."""
        return cls.from_dict(parse_toml(text, where), where=where)

    def checked(self) -> Self:
        """The parameters are those of the aggregator that `[run]` names, and the quorum is enough for it."""
        name = self.run.aggregation
        try:
            parameters = read_parameters(name, dict(self.aggregation), "[aggregation]")
        except ConfigError as error:
            raise FieldError("", error.message, error.fix) from error
        try:
            check_quorum(name, parameters, self.run.quorum)
        except ConfigError as error:
            raise FieldError("", f"[aggregation]: {error.message}", error.fix) from error
        return dataclasses.replace(self, aggregation=parameters)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back to an equal spec."""
        return super().to_dict() | {"aggregation": dict(self.aggregation)}

    def mechanism(self, steps: int | None = None) -> Mechanism:
        """The mechanism of one round as proposed, or of `steps` steps."""
        t = self.training
        return Mechanism(
            noise_multiplier=t.noise_multiplier,
            sampling_probability=t.sampling_probability,
            steps=t.steps_per_round if steps is None else steps,
            clipping_norm=t.clipping_norm,
        )

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        """Add what pydantic cannot know: each aggregator has its own [aggregation]."""
        schema = super().__get_pydantic_json_schema__(core_schema, handler)
        table = handler.resolve_ref_schema(schema)
        kinds = table["properties"]["aggregation"].pop("anyOf")
        table["properties"]["aggregation"]["type"] = "object"
        of_kind = dict(zip(dict.fromkeys(AGGREGATORS.values()), kinds, strict=True))
        table["allOf"] = [
            {
                "if": {
                    "properties": {
                        "run": {
                            "properties": {"aggregation": {"const": name}},
                            "required": [] if name == "fedavg" else ["aggregation"],
                        }
                    }
                },
                "then": {"properties": {"aggregation": of_kind[kind]}},
            }
            for name, kind in AGGREGATORS.items()
        ]
        return schema
