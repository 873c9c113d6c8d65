"""Run spec, manifest, receipt, refusal, mechanism: every wrong field is refused by name, every right one survives."""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fl_shared.adapters.safetensors import WIRES
from fl_shared.canonical import canonical_bytes, document_digest, parse_json
from fl_shared.documents.aggregators import AGGREGATIONS, ROBUST
from fl_shared.documents.order import RoundOrder, read_spec
from fl_shared.documents.round import REFUSAL_CODES, Receipt, Refusal, RoundManifest
from fl_shared.documents.spec import LORA_TARGETS, RunSpec
from fl_shared.errors import ConfigError
from fl_shared.privacy.mechanism import LEAST_CLIPPING_NORM, Mechanism
from helpers.specs import spec_toml

SPEC = spec_toml(
    name="hospital-demo",
    sites=["hospital-001", "hospital-002", "hospital-003"],
    rounds=6,
    quorum=2,
    round_timeout_s=600,
    aggregation="fedavg",
    labels=["A", "B", "C"],
    max_tokens=32,
    rank=8,
    alpha=16,
    targets=["attention", "shared_experts", "routed_experts"],
    steps_per_round=8,
    learning_rate=0.05,
    head_learning_rate=2.0,
    momentum=0.9,
    seed_adapter=0,
)
TABLE = RunSpec.from_text(SPEC).to_dict()
OPTIONAL = {
    ("run", "round_timeout_s"),
    ("run", "aggregation"),
    ("run", "wire"),
    ("lora", "alpha"),
    ("training", "momentum"),
    ("training", "seed_adapter"),
}
NOT_NUMBERS: list[Any] = ["1", True, None, [1], {"a": 1}, float("nan"), float("inf"), 10**400]
NOT_TEXTS: list[Any] = [5, None, True, "", ["a"], "\ud800"]
NOT_LISTS: list[Any] = ["a", 5, None, [], ["a", "a"], ["a", 5], ["a", ""], {"a": 1}]
WRONG: dict[tuple[str, str], list[Any]] = {
    ("run", "name"): [*NOT_TEXTS, "Demo", "../demo", "a/b", "alone:demo", "a" * 64],
    ("run", "base_model"): [*NOT_TEXTS, "0" * 64, "sha256:", "sha256:" + "0" * 63, "sha256:" + "A" * 64],
    ("run", "sites"): [*NOT_LISTS, ["hospital-001", "../x"], ["Hospital"]],
    ("run", "rounds"): [*NOT_NUMBERS, 0, -1, 1.0, 100_001],
    ("run", "quorum"): [*NOT_NUMBERS, 0, 4, 1.0],
    ("run", "round_timeout_s"): [*NOT_NUMBERS, 0, -5, 1e9],
    ("run", "aggregation"): [*NOT_TEXTS, "FedAvg", "mean"],
    ("run", "wire"): [*NOT_TEXTS, "float16", "INT8"],
    ("task", "kind"): [*NOT_TEXTS, "regression"],
    ("task", "labels"): [*NOT_LISTS, ["A"]],
    ("task", "max_tokens"): [*NOT_NUMBERS, 0, 1.5, 10**9],
    ("lora", "rank"): [*NOT_NUMBERS, 0, 8.0, 1025],
    ("lora", "alpha"): [*NOT_NUMBERS, 0, -1],
    ("lora", "targets"): [*NOT_LISTS, ["router"], ["attention", "all-linear"]],
    ("training", "noise_multiplier"): [*NOT_NUMBERS, 0, -1, 5e-324, 1e-200, 9e-5, 1.1e6, 1e308],
    ("training", "clipping_norm"): [*NOT_NUMBERS, 0, -1, 1e-5],
    ("training", "sampling_probability"): [*NOT_NUMBERS, 0, -0.1, 1.1, 5e-324, 1e-10],
    ("training", "steps_per_round"): [*NOT_NUMBERS, 0, 8.0, 10**7],
    ("training", "learning_rate"): [*NOT_NUMBERS, 0, -1],
    ("training", "head_learning_rate"): [*NOT_NUMBERS, 0, -1],
    ("training", "momentum"): [*NOT_NUMBERS, -0.1, 1],
    ("training", "seed_adapter"): [*NOT_NUMBERS, -1, 0.5, 2**63],
}
CASES = [(section, name, value) for (section, name), values in WRONG.items() for value in values]


def changed(section: str, name: str, value: Any) -> dict[str, Any]:
    table = copy.deepcopy(TABLE)
    table[section][name] = value
    return table


def test_every_field_has_wrong_values() -> None:
    """The list of wrong values below covers every field of the spec."""
    assert set(WRONG) == {(section, name) for section, fields in TABLE.items() for name in fields}


@pytest.mark.parametrize(("section", "name", "value"), CASES, ids=lambda each: repr(type(each).__name__))
def test_a_wrong_field_is_named(section: str, name: str, value: Any) -> None:
    """Each field with each wrong value is refused; the message names file, section and field, and a fix."""
    with pytest.raises(ConfigError) as caught:
        RunSpec.from_dict(changed(section, name, value), where="spec.toml")
    assert caught.value.message.startswith(f"spec.toml [{section}]: {name} ")
    assert caught.value.fix


@pytest.mark.parametrize(("section", "name"), sorted(WRONG))
def test_a_missing_field_is_named_unless_it_has_a_default(section: str, name: str) -> None:
    """Leaving a field out is refused by name, except where the documents give a default."""
    table = copy.deepcopy(TABLE)
    del table[section][name]
    if (section, name) in OPTIONAL:
        RunSpec.from_dict(table)
        return
    with pytest.raises(ConfigError, match=rf"\[{section}\]: {name} is missing"):
        RunSpec.from_dict(table)


@pytest.mark.parametrize("section", sorted(set(TABLE) - {"aggregation"}))  # its fields: test_aggregators.py
def test_unknown_names_are_refused(section: str) -> None:
    """A misspelt field or section is refused with what was probably meant."""
    name = next(iter(TABLE[section]))
    with pytest.raises(ConfigError, match=f"{name}x is not a field here") as caught:
        RunSpec.from_dict(changed(section, f"{name}x", 1))
    assert name in caught.value.fix
    with pytest.raises(ConfigError, match="extra is not a field here"):
        RunSpec.from_dict(TABLE | {"extra": {}})
    without = {key: value for key, value in TABLE.items() if key != section}
    with pytest.raises(ConfigError, match=f"{section} is missing; did you mean it by '{section}x'"):
        RunSpec.from_dict(without | {f"{section}x": TABLE[section]})
    for wrong in (None, 5, "x", [TABLE[section]]):
        with pytest.raises(ConfigError, match="not a table"):
            RunSpec.from_dict(TABLE | {section: wrong})


def test_the_documented_spec_reads(tmp_path: Path) -> None:
    """The spec of docs/architecture.md reads from a file as from text, and gives the mechanism it proposes."""
    path = tmp_path / "spec.toml"
    path.write_text(SPEC)
    spec = RunSpec.from_toml(path)
    assert spec == RunSpec.from_text(SPEC)
    assert spec.run.sites == ("hospital-001", "hospital-002", "hospital-003")
    assert spec.mechanism() == Mechanism(1.0, 0.1, 8, 1.0)
    assert spec.mechanism(steps=48).steps == 48


def test_defaults_are_the_documented_ones() -> None:
    """Optional fields left out take their defaults: alpha twice the rank, momentum 0.9, FedAvg, ten minutes."""
    table = copy.deepcopy(TABLE)
    for section, name in OPTIONAL:
        del table[section][name]
    spec = RunSpec.from_dict(table)
    assert (spec.lora.alpha, spec.training.momentum, spec.training.seed_adapter) == (16.0, 0.9, 0)
    assert (spec.run.aggregation, spec.run.wire, spec.run.round_timeout_s) == ("fedavg", "float32", 600.0)


def test_a_bad_file_is_named(tmp_path: Path) -> None:
    """A spec file that is no TOML is a ConfigError with its path and line."""
    path = tmp_path / "spec.toml"
    path.write_text("\n" + SPEC.replace("rounds = 6", "rounds = "))
    with pytest.raises(ConfigError, match=r"spec\.toml.*line 6"):
        RunSpec.from_toml(path)


NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,20}[a-z0-9])?", fullmatch=True)
TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), min_size=1, max_size=40)
DIGESTS = st.from_regex(r"sha256:[0-9a-f]{64}", fullmatch=True)
HASHES = st.from_regex(r"[0-9a-f]{64}", fullmatch=True)
POSITIVE = st.floats(1e-6, 1e5) | st.integers(1, 1000)
NOISE = st.floats(1e-4, 1e6) | st.integers(1, 1000)
TIMES = st.floats(0, 1e10) | st.integers(0, 10**10)


@st.composite
def specs(draw: st.DrawFn) -> RunSpec:
    """Any valid spec, from a table whose numbers may be whole or not."""
    sites = draw(st.lists(NAMES, min_size=1, max_size=5, unique=True))
    quorum = draw(st.integers(1, len(sites)))
    name = draw(st.sampled_from([each for each in AGGREGATIONS if quorum >= 3 or each not in ROBUST]))
    parameters = {"trimmed-mean": {"cut": 0.4}, "multi-krum": {"malicious": 0}}.get(name, {})
    return RunSpec.from_dict(
        {
            "run": {
                "name": draw(NAMES),
                "base_model": draw(DIGESTS),
                "sites": sites,
                "rounds": draw(st.integers(1, 100)),
                "quorum": quorum,
                "round_timeout_s": draw(st.floats(1, 1e5) | st.integers(1, 1000)),
                "aggregation": name,
                "wire": draw(st.sampled_from(WIRES)),
            },
            "aggregation": parameters,
            "task": {
                "kind": "classification",
                "labels": draw(st.lists(TEXTS, min_size=2, max_size=5, unique=True)),
                "max_tokens": draw(st.integers(1, 4096)),
            },
            "lora": {
                "rank": draw(st.integers(1, 64)),
                "alpha": draw(POSITIVE),
                "targets": draw(st.lists(st.sampled_from(LORA_TARGETS), min_size=1, unique=True)),
            },
            "training": {
                "noise_multiplier": draw(NOISE),
                "clipping_norm": draw(st.floats(LEAST_CLIPPING_NORM, 1e5)),
                "sampling_probability": draw(st.floats(1e-6, 1) | st.just(1)),
                "steps_per_round": draw(st.integers(1, 1000)),
                "learning_rate": draw(POSITIVE),
                "head_learning_rate": draw(POSITIVE),
                "momentum": draw(st.floats(0, 0.99) | st.just(0)),
                "seed_adapter": draw(st.integers(0, 2**63 - 1)),
            },
        }
    )


MECHANISMS = st.builds(
    Mechanism,
    noise_multiplier=NOISE,
    sampling_probability=st.floats(1e-9, 1),
    steps=st.integers(0, 10**6),
    clipping_norm=POSITIVE,
)
ADDRESS = {"run": NAMES | NAMES.map("alone:{}".format), "round": st.integers(1, 100), "site": NAMES}
RECEIPTS = st.builds(
    Receipt,
    **ADDRESS,
    manifest_digest=DIGESTS,
    spec_digest=DIGESTS,
    update_digest=DIGESTS,
    model_digest=DIGESTS,
    mechanism=MECHANISMS,
    steps_executed=st.integers(0, 10**6),
    epsilon_spent_total=st.floats(0, 1e6) | st.integers(0, 10),
    delta=st.floats(0, 1),
    privacy_unit=TEXTS,
    ledger_head=HASHES,
    ledger_entries=st.integers(1, 2**62),
    merkle_root=HASHES,
    entry_id=TEXTS,
    created_at=TIMES,
)
REFUSALS = st.builds(
    Refusal,
    **ADDRESS,
    manifest_digest=DIGESTS,
    code=st.sampled_from(REFUSAL_CODES),
    message=st.text(max_size=5000),
    created_at=TIMES,
)


@st.composite
def manifests(draw: st.DrawFn) -> RoundManifest:
    """Any valid manifest."""
    issued = draw(TIMES)
    address: dict[str, Any] = {name: draw(each) for name, each in ADDRESS.items()}
    return RoundManifest(
        **address,
        spec=draw(specs()),
        adapter_digest=draw(DIGESTS),
        nonce=draw(TEXTS),
        issued_at=issued,
        expires_at=issued + draw(st.integers(1, 10**6)),
    )


ORDERS = st.builds(
    RoundOrder, **ADDRESS, spec_digest=DIGESTS, adapter_digest=DIGESTS, nonce=TEXTS, issued_at=TIMES, expires_at=TIMES
)


def travelled(document: Any) -> Any:
    return parse_json(json.dumps(document.to_dict()), "document")


@given(specs())
def test_a_spec_survives_the_wire(spec: RunSpec) -> None:
    """A spec read back from JSON is equal and has the same digest."""
    back = RunSpec.from_dict(travelled(spec))
    assert back == spec
    assert back.digest == spec.digest


@given(specs())
def test_a_spec_is_read_from_the_text_that_its_digest_is_of(spec: RunSpec) -> None:
    """What travels beside an order is the canonical form, and it is kept: computed once, and never of another spec."""
    assert spec.canonical.encode() == canonical_bytes(spec.to_dict())
    assert spec.digest == document_digest(spec.to_dict())
    assert spec.canonical is spec.canonical
    back = read_spec(spec.canonical, spec.digest)
    assert back == spec
    assert back.digest == spec.digest
    more = dataclasses.replace(spec, lora=dataclasses.replace(spec.lora, rank=spec.lora.rank + 1))
    assert more.digest == document_digest(more.to_dict()) != spec.digest


@given(ORDERS)
def test_an_order_survives_the_wire(order: RoundOrder) -> None:
    """Read back it is equal and has the digest that its maker computed, also when the times were whole numbers."""
    back = RoundOrder.from_dict(travelled(order))
    assert back == order
    assert back.digest == order.digest == document_digest(travelled(order))


@given(manifests())
def test_a_manifest_survives_the_wire(manifest: RoundManifest) -> None:
    """A manifest read back has the digest that its maker computed, also when the times were whole numbers."""
    back = RoundManifest.from_dict(travelled(manifest))
    assert back == manifest
    assert back.digest == manifest.digest == document_digest(travelled(manifest))
    assert back.spec_digest == manifest.spec.digest


@given(RECEIPTS)
def test_a_receipt_survives_the_wire(receipt: Receipt) -> None:
    """A receipt read back is equal, and its canonical bytes, which are signed, are the same."""
    back = Receipt.from_dict(travelled(receipt))
    assert back == receipt
    assert canonical_bytes(back.to_dict()) == canonical_bytes(receipt.to_dict())


@given(REFUSALS)
def test_a_refusal_can_always_be_read(refusal: Refusal) -> None:
    """Whatever text a refusal was made with, the coordinator can read it, with no control characters in it."""
    back = Refusal.from_dict(travelled(refusal))
    assert dataclasses.replace(back, message=refusal.message) == refusal
    assert 0 < len(back.message) <= 2000
    assert all(each.isprintable() or each in "\n\t" for each in back.message)
    assert canonical_bytes(back.to_dict()) == canonical_bytes(refusal.to_dict())


def test_a_digest_is_computed_once() -> None:
    """However often it is read, and again for a document that was changed by `replace`."""
    manifest = DOCUMENTS["manifest"]
    assert manifest.spec.digest is manifest.spec.digest is manifest.spec_digest
    assert manifest.digest is manifest.digest
    assert dataclasses.replace(manifest, round=2).digest != manifest.digest


OTHER = {"name": "demo-2", "base_model": "sha256:" + "1" * 64, "aggregation": "ffa", "wire": "int8"} | {
    "momentum": 0.5,
    "sampling_probability": 0.2,
}


@pytest.mark.parametrize(("section", "name"), sorted(set(WRONG) - {("task", "kind")}))
def test_a_spec_that_differs_in_one_field_has_another_digest(section: str, name: str) -> None:
    """Every field that can take two values is under the digest."""
    value = TABLE[section][name]
    other = OTHER.get(name) or (value[::-1] if isinstance(value, list) else value + 1)
    spec = RunSpec.from_dict(changed(section, name, other))
    assert spec.digest != RunSpec.from_dict(TABLE).digest


DOCUMENTS: dict[str, Any] = {
    "manifest": RoundManifest(
        "demo", 1, "hospital-001", RunSpec.from_text(SPEC), "sha256:" + "1" * 64, "nonce", 1.0, 2.0
    ),
    "order": RoundOrder("demo", 1, "hospital-001", "sha256:" + "2" * 64, "sha256:" + "1" * 64, "nonce", 1.0, 2.0),
    "receipt": Receipt(
        run="demo",
        round=1,
        site="hospital-001",
        manifest_digest="sha256:" + "1" * 64,
        spec_digest="sha256:" + "2" * 64,
        update_digest="sha256:" + "3" * 64,
        model_digest="sha256:" + "4" * 64,
        mechanism=Mechanism(1.0, 0.1, 8, 1.0),
        steps_executed=8,
        epsilon_spent_total=1.5,
        delta=1e-5,
        privacy_unit="record",
        ledger_head="5" * 64,
        ledger_entries=3,
        merkle_root="6" * 64,
        entry_id="e-1",
        created_at=1.0,
    ),
    "refusal": Refusal("demo", 1, "hospital-001", "sha256:" + "1" * 64, "policy", "no", 1.0),
    "mechanism": Mechanism(1.0, 0.1, 8, 1.0),
}
NONSENSE: list[Any] = [None, {}, [], "\ud800", -1, float("nan"), 10**400, "", True, b"x"]


@pytest.mark.parametrize(
    ("kind", "name"), [(kind, name) for kind, made in DOCUMENTS.items() for name in made.to_dict()]
)
def test_a_document_with_one_wrong_field_is_refused(kind: str, name: str) -> None:
    """Each field of each document, missing or nonsense, is a ConfigError with a fix and nothing else."""
    made = DOCUMENTS[kind]
    table = made.to_dict()
    without = {key: value for key, value in table.items() if key != name}
    for wrong in [without, *(table | {name: value} for value in NONSENSE)]:
        with pytest.raises(ConfigError) as caught:
            type(made).from_dict(wrong)
        assert caught.value.fix
        assert len(caught.value.message) < 400


@pytest.mark.parametrize("kind", sorted(DOCUMENTS))
def test_a_document_of_another_kind_is_refused(kind: str) -> None:
    """No document reads as another: a receipt is no manifest, and an extra field is refused."""
    made = DOCUMENTS[kind]
    assert type(made).from_dict(made.to_dict()) == made
    for other, document in DOCUMENTS.items():
        if other != kind:
            with pytest.raises(ConfigError):
                type(made).from_dict(document.to_dict())
    with pytest.raises(ConfigError, match="extra is not a field here"):
        type(made).from_dict(made.to_dict() | {"extra": 1})


def test_a_manifest_holds_its_own_spec() -> None:
    """A manifest whose spec was changed after the digest was made, is refused."""
    table = DOCUMENTS["manifest"].to_dict()
    table["spec"]["training"]["noise_multiplier"] = 0.01
    with pytest.raises(ConfigError, match="spec_digest is not the digest"):
        RoundManifest.from_dict(table)


@pytest.mark.parametrize(
    "wrong",
    [
        {"noise_multiplier": 0.0},
        {"noise_multiplier": float("inf")},
        {"noise_multiplier": float("nan")},
        {"sampling_probability": 0.0},
        {"sampling_probability": 1.0000001},
        {"steps": -1},
        {"steps": 1.0},
        {"steps": True},
        {"clipping_norm": 0.0},
        {"neighbouring": "replace-one"},
        {"kind": "laplace"},
    ],
    ids=repr,
)
def test_a_mechanism_that_protects_nothing_cannot_be_made(wrong: dict[str, Any]) -> None:
    """Constructing a mechanism checks it, not only reading one."""
    with pytest.raises(ConfigError, match=f"mechanism: {next(iter(wrong))} is"):
        dataclasses.replace(Mechanism(1.0, 0.1, 8, 1.0), **wrong)
