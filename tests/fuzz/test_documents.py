"""Whatever bytes come as a spec, an order, a receipt, a refusal, a question or an answer: a value or our own error."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from fl_client.agent.orders import Assignment, ReceivedOrder
from fl_server.rounds.replies import Expected
from fl_shared.canonical import canonical_bytes, parse_json, sha256_hex
from fl_shared.documents.base_model import BaseModel
from fl_shared.documents.order import RoundOrder, read_spec
from fl_shared.documents.plan import PlanAnswer, PlanQuestion
from fl_shared.documents.round import Receipt, Refusal, RoundManifest
from fl_shared.documents.spec import RunSpec
from fl_shared.errors import ConcordatError
from fl_shared.identity.signing import SigningKey, open_document, sign_document
from fl_shared.privacy.mechanism import Mechanism
from fl_shared.toml import parse_toml
from helpers.specs import spec_toml

DIGEST = "sha256:" + "a" * 64
SPEC = spec_toml(sites=["h-1", "h-2"], rounds=2)
KEY = SigningKey.generate()
RUN = RunSpec.from_text(SPEC)
NOW = time.time()
MANIFEST = RoundManifest("demo", 1, "h-1", RUN, DIGEST, "n", NOW, NOW + 9)
ORDER = RoundOrder("demo", 1, "h-1", RUN.digest, DIGEST, "n", NOW, NOW + 9)
RECEIPT = Receipt(
    run="demo", round=1, site="h-1", manifest_digest=MANIFEST.digest, spec_digest=RUN.digest, update_digest=DIGEST,
    model_digest=DIGEST, mechanism=Mechanism(1.0, 0.1, 4, 1.0), steps_executed=4, epsilon_spent_total=0.5, delta=1e-5,
    privacy_unit="record", ledger_head="b" * 64, ledger_entries=3, merkle_root="c" * 64, entry_id="3:x", created_at=NOW,
)  # fmt: skip
REFUSAL = Refusal("demo", 1, "h-1", MANIFEST.digest, "policy", "no", NOW)
QUESTION = PlanQuestion("d" * 32, "h-1", RUN, NOW, NOW + 9)
ANSWER = PlanAnswer("d" * 32, QUESTION.digest, "h-1", 2, 1, 0.0, (), NOW)
READERS: list[tuple[Callable[[Any], Any], dict[str, Any]]] = [
    (RunSpec.from_dict, RUN.to_dict()),
    (RoundManifest.from_dict, MANIFEST.to_dict()),
    (RoundOrder.from_dict, ORDER.to_dict()),
    (Receipt.from_dict, RECEIPT.to_dict()),
    (Refusal.from_dict, REFUSAL.to_dict()),
    (PlanQuestion.from_dict, QUESTION.to_dict()),
    (PlanAnswer.from_dict, ANSWER.to_dict()),
    (BaseModel.from_dict, BaseModel(DIGEST, ("attention",)).to_dict()),
    (Mechanism.from_dict, RECEIPT.mechanism.to_dict()),
]

LEAVES = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=30)
    | st.sampled_from([DIGEST, "h-1", "demo", 1 << 70, -1, 10**400, float("inf"), 1e308, 5e-324, "\0", "\ud800"])
)  # fmt: skip
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)
SIGNS = ['"""', "'''", "[[", "]]", "{", "}", "\\", "#", "=", ".", "\n", "\0", "1e999", "inf", "nan", "9" * 5000]


@st.composite
def changed(draw: st.DrawFn, whole: dict[str, Any]) -> dict[str, Any]:
    """A document of ours in which a few values, at any depth, were dropped, replaced or added."""
    made: dict[str, Any] = json.loads(json.dumps(whole))
    for _ in range(draw(st.integers(1, 3))):
        table = made
        while True:
            name = draw(st.sampled_from(sorted(table)) if table else st.just("x"))
            if isinstance(table.get(name), dict) and draw(st.booleans()):
                table = table[name]
                continue
            break
        match draw(st.integers(0, 2)):
            case 0:
                table.pop(name, None)
            case 1:
                table[name] = draw(VALUES)
            case _:
                table[draw(st.text(max_size=8))] = draw(VALUES)
    return made


def _canonical(table: dict[str, Any]) -> str:
    try:
        return canonical_bytes(table).decode()
    except ConcordatError:
        return ""


@st.composite
def spliced(draw: st.DrawFn, text: str) -> str:
    """A text in which a stretch was replaced by others or repeated."""
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(text)))
        end = min(len(text), start + draw(st.integers(0, 40)))
        piece = draw(st.text(max_size=20) | st.sampled_from(SIGNS) | st.just(text[start:end] * 3))
        text = text[:start] + piece + text[end:]
    return text


@given(st.text(max_size=400) | spliced(SPEC))
@example("a=" + "[" * 5000)
@example("[run]\nname = 1979-05-27T07:32:00Z")
@example("[run]\nsites = [1979-05-27]")
@example("[training]\nnoise_multiplier = nan")
@example("\ufeff[run]")
def test_any_text_as_a_spec(text: str) -> None:
    """As it comes over the control API."""
    with contextlib.suppress(ConcordatError):
        found = RunSpec.from_text(text)
        assert RunSpec.from_dict(found.to_dict()) == found
    with contextlib.suppress(ConcordatError):
        parse_toml(text, "x")


@given(st.data())
def test_any_document_of_the_wrong_form(data: st.DataObject) -> None:
    """Each kind of document, from values of any type at any place."""
    reader, whole = data.draw(st.sampled_from(READERS))
    table = data.draw(changed(whole) | VALUES)
    with contextlib.suppress(ConcordatError):
        found = reader(table)
        assert reader(found.to_dict()) == found


@given(st.text(max_size=400) | spliced(RUN.canonical) | changed(RUN.to_dict()).map(_canonical))
@example("[" * 200_000)
@example("1" * 5000)
@example("1e999")
@example('"\ud800"')
def test_any_text_beside_an_order_that_names_its_digest(text: str) -> None:
    """A spec of exactly these bytes, or our own error; and never under the digest of another one."""
    with contextlib.suppress(ConcordatError):
        named = f"sha256:{sha256_hex(text.encode('utf-8', 'surrogatepass'))}"
        found = read_spec(text, named)
        assert canonical_bytes(json.loads(text)).decode() == text
        assert RunSpec.from_dict(json.loads(text)) == found
    with contextlib.suppress(ConcordatError):
        assert read_spec(text, RUN.digest) == RUN


@given(st.data())
def test_any_order_that_a_key_of_ours_signed(data: st.DataObject) -> None:
    """What a hostile coordinator signs with its right key, as an agent reads it: an assignment or our own error."""
    body = data.draw(changed(data.draw(st.sampled_from([ORDER.to_dict(), MANIFEST.to_dict()]))))
    spec_json = data.draw(st.sampled_from([RUN.canonical, "", "{}"]))
    with contextlib.suppress(ConcordatError):
        arrived = ReceivedOrder.read(json.dumps(sign_document(KEY, body)), "h-1")
        arrived.require_signed(lambda key: key == KEY.public_hex)
        found = Assignment.of(arrived, spec_json)
        assert (found.run, found.round, found.spec) == (arrived.run, arrived.round, found.spec)
        assert found.spec_digest == body["spec_digest"]


@given(st.text(max_size=300) | spliced(json.dumps(sign_document(KEY, ORDER.to_dict()))))
@example("[" * 200_000)
@example("1" * 5000)
@example('{"body": {"run": "demo", "round": 1}, "key": 1, "signature": []}')
def test_any_text_as_an_order(text: str) -> None:
    """As it comes over the agent's socket: nothing but the signed one opens."""
    with contextlib.suppress(ConcordatError):
        arrived = ReceivedOrder.read(text, "h-1")
        arrived.require_signed(lambda key: key == KEY.public_hex)
        assert arrived.digest == ORDER.digest


@given(st.binary(max_size=300) | st.text(max_size=300) | spliced(json.dumps(sign_document(KEY, RECEIPT.to_dict()))))
@example("[" * 200_000)
@example('{"a":' * 50_000)
@example(b"\xff\xfe")
@example('{"body": {}, "key": 1, "signature": []}')
@example("1" * 5000)
@example("1e999")
def test_any_bytes_as_a_signed_document(raw: bytes | str) -> None:
    """Parsed, opened with the key that it names, and made canonical."""
    with contextlib.suppress(ConcordatError):
        found = parse_json(raw, "the document")
        with contextlib.suppress(ConcordatError):
            canonical_bytes(found)
        open_document(found, str(found.get("key")) if isinstance(found, dict) else "")


@given(VALUES)
def test_any_values_made_canonical(value: Any) -> None:
    """Bytes that are read back as the same bytes, or our own error."""
    with contextlib.suppress(ConcordatError):
        made = canonical_bytes(value)
        assert canonical_bytes(parse_json(made, "it")) == made


@given(st.data())
def test_any_reply_of_a_site(data: st.DataObject) -> None:
    """What a hostile site signs with its own, right key; the update is any bytes."""
    expected = Expected(RUN, 1, "h-1", KEY.public_hex, lambda digest: digest == MANIFEST.digest)
    whole = data.draw(st.sampled_from([RECEIPT.to_dict(), REFUSAL.to_dict()]))
    body = data.draw(changed(whole))
    with contextlib.suppress(ConcordatError):
        text = json.dumps(sign_document(KEY, body))
        with contextlib.suppress(ConcordatError):
            expected.refusal(data.draw(st.sampled_from(["refused", "failed", "x"])), text)
        expected.receipt(text, data.draw(st.binary(max_size=200)))
    raw = data.draw(st.text(max_size=100))
    for read in (lambda: expected.refusal("failed", raw), lambda: expected.receipt(raw, b"")):
        with contextlib.suppress(ConcordatError):
            read()
