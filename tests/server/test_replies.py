"""Every way in which a site's answer can be wrong, and that each is refused by its name."""

from __future__ import annotations

import dataclasses
import json
import time
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fl_server.rounds.replies import BadReply, Expected
from fl_shared.adapters.safetensors import digest, pack
from fl_shared.documents.round import Receipt, Refusal
from fl_shared.errors import ConfigError
from fl_shared.identity.signing import SigningKey, sign_document
from helpers.specs import run_spec

KEY = SigningKey.generate()
OTHER = SigningKey.generate()
MANIFEST = "sha256:" + "1" * 64
UPDATE = pack({"lora_A": np.ones((2, 2), np.float32)})
SPEC = run_spec()


def _expected() -> Expected:
    return Expected(SPEC, 2, "hospital-001", KEY.public_hex, lambda found: found == MANIFEST)


def _receipt(**changes: Any) -> Receipt:
    whole: dict[str, Any] = {
        "run": "demo",
        "round": 2,
        "site": "hospital-001",
        "manifest_digest": MANIFEST,
        "spec_digest": SPEC.digest,
        "update_digest": digest(UPDATE),
        "model_digest": SPEC.run.base_model,
        "mechanism": SPEC.mechanism(),
        "steps_executed": 4,
        "epsilon_spent_total": 1.25,
        "delta": 1e-5,
        "privacy_unit": "record",
        "ledger_head": "0" * 64,
        "ledger_entries": 3,
        "merkle_root": "1" * 64,
        "entry_id": "e1",
        "created_at": time.time(),
    }
    return Receipt(**(whole | changes))


def _signed(document: Receipt | Refusal, key: SigningKey = KEY) -> str:
    return json.dumps(sign_document(key, document.to_dict()))


def _refusal(**changes: Any) -> Refusal:
    whole: dict[str, Any] = {
        "run": "demo",
        "round": 2,
        "site": "hospital-001",
        "manifest_digest": MANIFEST,
        "code": "budget-exhausted",
        "message": "epsilon 7.9 of 8 is spent",
        "created_at": time.time(),
    }
    return Refusal(**(whole | changes))


def test_a_right_receipt_gives_its_tensors_and_figures() -> None:
    """What the site signed is stored as it came, with epsilon and delta beside it."""
    text = _signed(_receipt())
    reply, tensors = _expected().receipt(text, UPDATE)
    assert (reply.status, reply.site, reply.document_json) == ("ok", "hospital-001", text)
    assert (reply.epsilon_spent_total, reply.delta) == (1.25, 1e-5)
    np.testing.assert_array_equal(tensors["lora_A"], np.ones((2, 2), np.float32))


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"run": "other"}, "wrong-round"),
        ({"round": 1}, "wrong-round"),
        ({"site": "hospital-002"}, "wrong-round"),
        ({"manifest_digest": "sha256:" + "2" * 64}, "wrong-manifest"),
        ({"spec_digest": "sha256:" + "2" * 64}, "wrong-spec"),
        ({"model_digest": "sha256:" + "2" * 64}, "wrong-spec"),
        ({"update_digest": "sha256:" + "2" * 64}, "wrong-digest"),
        ({"created_at": time.time() + 86_400}, "wrong-time"),
    ],
)
def test_a_receipt_for_something_else_is_refused(changes: dict[str, Any], code: str) -> None:
    """A validly signed receipt for another run, round, site, manifest, spec, model or update counts for nothing."""
    with pytest.raises(BadReply) as caught:
        _expected().receipt(_signed(_receipt(**changes)), UPDATE)
    assert caught.value.code == code


def test_another_key_is_refused_even_when_its_signature_is_right() -> None:
    """A receipt signed by any other key than the one of enrolment is no receipt of this site."""
    with pytest.raises(BadReply) as caught:
        _expected().receipt(_signed(_receipt(), OTHER), UPDATE)
    assert caught.value.code == "bad-signature"
    disguised = json.loads(_signed(_receipt(), OTHER)) | {"key": KEY.public_hex}
    with pytest.raises(BadReply) as caught:
        _expected().receipt(json.dumps(disguised), UPDATE)
    assert caught.value.code == "bad-signature"


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Receipt)])
def test_a_receipt_changed_after_signing_is_refused(name: str) -> None:
    """Every single field is under the signature."""
    document = json.loads(_signed(_receipt()))
    value = document["body"][name]
    if isinstance(value, dict):
        changed: Any = value | {"noise_multiplier": 9.0}
    elif isinstance(value, str):
        changed = ("b" + value[1:]) if value else "x"
    else:
        changed = value + 1
    document["body"][name] = changed
    with pytest.raises(BadReply) as caught:
        _expected().receipt(json.dumps(document), UPDATE)
    assert caught.value.code == "bad-signature"


def test_an_update_exchanged_on_the_way_is_refused() -> None:
    """The receipt names the bytes of its update; others do not pass."""
    other = pack({"lora_A": np.zeros((2, 2), np.float32)})
    with pytest.raises(BadReply) as caught:
        _expected().receipt(_signed(_receipt()), other)
    assert caught.value.code == "wrong-digest"


@pytest.mark.parametrize("update", [b"x", b"\xff" * 64, UPDATE[:-1], UPDATE + b"\0"])
def test_an_update_that_is_no_adapter_is_refused(update: bytes) -> None:
    """Bytes that the site signed but that are no safetensors file are refused without a crash."""
    with pytest.raises(BadReply):
        _expected().receipt(_signed(_receipt(update_digest=digest(update))), update)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4),
    max_leaves=12,
)


@given(
    text=st.text(max_size=200)
    | _JSON.map(json.dumps)
    | st.fixed_dictionaries({"body": _JSON, "key": st.just(KEY.public_hex), "signature": st.text(max_size=130)}).map(
        json.dumps
    )
)
@settings(deadline=None, max_examples=200)
def test_no_document_crashes_the_coordinator(text: str) -> None:
    """Whatever text arrives, the only outcome is a refusal of this one reply."""
    with pytest.raises(BadReply):
        _expected().receipt(text, UPDATE)
    with pytest.raises(BadReply):
        _expected().refusal("refused", text)


@given(body=st.dictionaries(st.text(max_size=10), _JSON, max_size=5))
@settings(deadline=None, max_examples=100)
def test_no_signed_nonsense_crashes_the_coordinator(body: dict[str, Any]) -> None:
    """An enrolled site may sign any body; it is refused, and nothing else happens."""
    try:
        text = json.dumps(sign_document(KEY, body))
    except ConfigError:
        return  # a body that cannot be signed cannot be sent either
    with pytest.raises(BadReply):
        _expected().receipt(text, UPDATE)
    with pytest.raises(BadReply):
        _expected().refusal("refused", text)


def test_a_refusal_is_stored_with_its_reason() -> None:
    """The admin sees the site's own code and words."""
    reply = _expected().refusal("refused", _signed(_refusal()))
    assert reply is not None
    assert (reply.status, reply.code) == ("refused", "budget-exhausted")
    assert "7.9" in reply.message
    failed = _expected().refusal("failed", _signed(_refusal(code="failed")))
    assert failed is not None
    assert failed.status == "failed"


def test_a_refusal_of_another_site_or_round_is_not_one_of_this() -> None:
    """A refusal cannot be moved to another round, site or manifest, nor signed by another."""
    for changes in ({"round": 1}, {"site": "hospital-002"}, {"manifest_digest": "sha256:" + "3" * 64}):
        with pytest.raises(BadReply):
            _expected().refusal("refused", _signed(_refusal(**changes)))
    with pytest.raises(BadReply) as caught:
        _expected().refusal("refused", _signed(_refusal(), OTHER))
    assert caught.value.code == "bad-signature"


def test_a_receipt_is_no_refusal_and_the_other_way_round() -> None:
    """Documents of the two kinds cannot stand for each other."""
    with pytest.raises(BadReply):
        _expected().refusal("refused", _signed(_receipt()))
    with pytest.raises(BadReply):
        _expected().receipt(_signed(_refusal()), UPDATE)


def test_an_agent_that_is_not_there_is_asked_again() -> None:
    """The ClientApp's unsigned note that it reached no agent is no answer, and only with status failed."""
    note = json.dumps({"code": "unreachable", "message": "the site's agent is not there"})
    assert _expected().refusal("failed", note) is None
    with pytest.raises(BadReply):
        _expected().refusal("refused", note)
