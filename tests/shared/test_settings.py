"""`fl_shared.fields`, `fl_shared.toml`: whatever is wrong in a file, the message names field, value and fix."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from fl_shared.declaration import Document
from fl_shared.errors import ConfigError
from fl_shared.fields import Between, Choice, OneOf, PathField, SiteName, Text, Texts, Whole
from fl_shared.names import run_id, run_name, site_id
from fl_shared.toml import load_toml, parse_toml


def declared(**rules: Any) -> type[Document]:
    """A document with these fields; a rule and its default in a pair."""
    fields = [(name, *rule) if isinstance(rule, tuple) else (name, rule) for name, rule in rules.items()]
    return dataclasses.make_dataclass("Declared", fields, bases=(Document,), frozen=True)


WHOLE, CHOICE = Annotated[int, Whole(1, 9)], Annotated[str, Choice(["fedavg", "ffa"])]
READERS: dict[str, Any] = {
    "text": Text,
    "boolean": bool,
    "integer": WHOLE,
    "number": Annotated[float, Between(0, 1, above=True)],
    "unbounded number": Annotated[float, Between()],
    "choice": CHOICE,
    "texts": Annotated[tuple[str, ...], Texts(1, 3)],
    "path": PathField,
    "table": Annotated[tuple[Any, ...], OneOf([declared()])],
    "section": declared(),
    "named": SiteName,
}
DOCUMENTS = {kind: declared(field=rule) for kind, rule in READERS.items()}
NOTHING = object()
# What a JSON or TOML parser can hand over, as far as it can go wrong.
WRONG: dict[str, Any] = {
    "missing": NOTHING,
    "null": None,
    "empty": "",
    "zero byte": "a\0b",
    "surrogate": "\ud800",
    "nan": float("nan"),
    "infinity": float("inf"),
    "huge": 10**5000,
    "negative": -1,
    "bytes": b"x",
    "doubled": ["a", "a"],
    "mixed": ["a", 1],
    "list of lists": [[]],
}
ACCEPTED = {("unbounded number", "negative")}


@pytest.mark.parametrize("kind", sorted(READERS))
@pytest.mark.parametrize("value", sorted(WRONG))
def test_a_wrong_value_names_field_and_fix(kind: str, value: str) -> None:
    """Each reader refuses each wrong value with the place, the field and a fix, and never otherwise."""
    table = {} if value == "missing" else {"field": WRONG[value]}
    document = DOCUMENTS[kind]
    if (kind, value) in ACCEPTED:
        document.from_dict(table, where="site.toml [policy]")
        return
    with pytest.raises(ConfigError) as caught:
        document.from_dict(table, where="site.toml [policy]")
    assert "site.toml [policy]" in caught.value.message
    assert "field" in caught.value.message
    assert caught.value.fix
    assert len(caught.value.message) < 400


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.dates(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
)


@given(st.sampled_from(sorted(READERS)), VALUES)
def test_any_value_is_read_or_refused(kind: str, value: Any) -> None:
    """Whatever a parser hands over, a reader returns it or raises ConfigError."""
    with contextlib.suppress(ConfigError):
        DOCUMENTS[kind].from_dict({"field": value})


def as_before(kind: str, value: Any) -> bool:
    """What the rules say, written once more without pydantic."""
    text = isinstance(value, str) and "\0" not in value and not any("\ud800" <= each <= "\udfff" for each in value)
    match kind:
        case "text":
            return text and 0 < len(value) <= 4096
        case "boolean":
            return value is True or value is False
        case "integer":
            return type(value) is int and 1 <= value <= 9
        case "number":
            return type(value) in (int, float) and 0 < value <= 1
        case "unbounded number":
            return (type(value) is float and math.isfinite(value)) or (type(value) is int and abs(value) <= 1 << 64)
        case "choice":
            return value in ("fedavg", "ffa") and isinstance(value, str)
        case "texts":
            words = isinstance(value, list | tuple) and all(
                as_before("text", each) and len(each) <= 512 for each in value
            )
            return words and 1 <= len(value) <= 3 and len(set(value)) == len(value)
        case "path":
            return text and bool(value) and not value.startswith("~")
        case "table":
            return isinstance(value, dict)
        case "section":
            return isinstance(value, dict) and not value
        case _:
            return isinstance(value, str) and re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", value) is not None


NEAR = st.sampled_from([
    0, 1, 9, 10, 1.0, 0.0, -0.0, 5e-324, 1.0000000000000002,
    1 << 64, (1 << 64) + 1, -(1 << 64) - 1, 10**400, True, "ffa",
    "FFA", "a" * 63, "a" * 64, "a" * 4096, "a" * 4097,
    ["a"], ("a", "b"), ["a", "a"], ["a" * 512], ["a" * 513], {"a"}, "a\n",
    float("nan"), float("inf"), {}, [], "\udfff", "\0", b"a", frozenset("a"), bytearray(b"a"),
])  # fmt: skip


@given(st.sampled_from(sorted(READERS)), VALUES | NEAR)
def test_a_value_is_accepted_exactly_by_the_rules(kind: str, value: Any) -> None:
    """Nothing more and nothing less than the hand-written reader took; what is read is what was written."""
    assume(kind != "path" or not str(value).startswith("~"))  # whether there is such a user
    document = DOCUMENTS[kind]
    if not as_before(kind, value):
        with pytest.raises(ConfigError) as caught:
            document.from_dict({"field": value})
        assert caught.value.fix
        return
    made: Any = document.from_dict({"field": value})
    if kind not in ("path", "section", "table"):
        assert made.field == (tuple(value) if kind == "texts" else value)


def between(low: float, high: float, **ends: bool) -> Any:
    return Annotated[float, Between(low, high, **ends)]


@pytest.mark.parametrize(
    ("rule", "value", "fix"),
    [
        (WHOLE, 0, "write a whole number from 1 to 9"),
        (WHOLE, 10, "write a whole number from 1 to 9"),
        (WHOLE, True, "write a whole number from 1 to 9"),
        (WHOLE, 3.0, "write a whole number from 1 to 9"),
        (between(0, 1), 1.0000001, "write a number from 0 to 1"),
        (between(0, 1, above=True), 0, "write a number above 0 to 1"),
        (between(0, 1, below=True), 1, "write a number from 0 and below 1"),
        (between(0, 1), "0.5", "write a number from 0 to 1"),
        (bool, 1, "write true or false"),
        (CHOICE, "fedAvg", "write one of fedavg, ffa"),
    ],
)
def test_the_ends_of_a_range_hold(rule: Any, value: Any, fix: str) -> None:
    """A value just outside, or of a type that looks alike, is refused with the range in the fix."""
    with pytest.raises(ConfigError, match="x: n is") as caught:
        declared(n=rule).from_dict({"n": value}, where="x")
    assert caught.value.fix == fix
    assert repr(value) in caught.value.message


def test_the_ends_of_a_range_belong_to_it() -> None:
    """The bounds themselves are accepted unless excluded, and numbers come as float."""
    made: Any = declared(low=WHOLE, high=between(1, 9)).from_dict({"low": 1, "high": 9}, where="x")
    assert made.low == 1
    assert (made.high, type(made.high)) == (9.0, float)


def test_unknown_fields_are_refused_with_the_nearest_name() -> None:
    """A misspelt optional field is named, with the field that was probably meant."""
    policy = declared(max_epsilon=(between(0, 9), 3.0))
    made: Any = policy.from_dict({})
    assert made.max_epsilon == 3.0
    with pytest.raises(ConfigError, match=r"site.toml \[policy\]: max_epsilom is not a field here") as caught:
        policy.from_dict({"max_epsilom": 1.0}, where="site.toml [policy]")
    assert caught.value.fix == "did you mean 'max_epsilon'?"


def test_a_misspelt_required_field_is_shown() -> None:
    """A missing field says which of the given ones may be its misspelling."""
    with pytest.raises(ConfigError, match="name is missing; did you mean it by 'nmae'"):
        declared(name=Text).from_dict({"nmae": "x"}, where="x")


def test_an_unknown_field_like_nothing_lists_what_is_known() -> None:
    """Where no name is near, the known ones are listed."""
    with pytest.raises(ConfigError) as caught:
        declared(alpha=(Text, "")).from_dict({"zzz": 1}, where="x")
    assert caught.value.fix == "known here: alpha"


def test_long_values_are_cut_in_messages() -> None:
    """A value of thousands of characters does not fill the screen."""
    with pytest.raises(ConfigError) as caught:
        declared(sites=READERS["texts"]).from_dict({"sites": ["x" * 600] * 50}, where="x")
    assert len(caught.value.message) < 200


def test_defaults_are_the_callers() -> None:
    """Absent optional fields give the default, also None for a text; an absent optional table is an empty one."""
    inner = declared(e=(Annotated[int, Whole(0, 9)], 4))
    outer = declared(a=(Text | None, None), b=(bool, True), c=(READERS["texts"], ()))
    outer = dataclasses.make_dataclass("Outer", [("d", inner, dataclasses.field(default_factory=inner))],
                                       bases=(outer,), frozen=True)  # fmt: skip
    outer.SECTIONS = True
    made: Any = outer.from_dict({}, where="x")
    assert made.a is None
    assert made.b is True
    assert made.c == ()
    assert made.d.e == 4


def test_paths_start_at_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A relative path starts at the file's folder, also in a nested table; `~` and absolute paths stand."""
    monkeypatch.setenv("HOME", "/home/someone")
    top = declared(data=declared(a=PathField, b=PathField, c=PathField, e=(PathField, Path())))
    table = {"a": "x/y.csv", "b": "/abs", "c": "~/d"}
    made: Any = top.from_dict({"data": table}, where="x", base=tmp_path)
    assert made.data.a == tmp_path / "x/y.csv"
    assert made.data.b == Path("/abs")
    assert made.data.c == Path("/home/someone/d")
    with pytest.raises(ConfigError, match="e is '~nobody"):
        top.from_dict({"data": table | {"e": "~nobody-has-this-name/x"}}, where="x", base=tmp_path)


def load(tmp_path: Path, data: bytes) -> dict[str, Any]:
    path = tmp_path / "file.toml"
    path.write_bytes(data)
    return load_toml(path)


@pytest.mark.parametrize(
    "data",
    [b"a = ", b"a = 1\na = 2", b"\xff", b"a = " + b"9" * 5000, b"a = " + b"[" * 100_000, b"#" * (1 << 20) + b"\n"],
    ids=["cut", "twice", "latin", "endless number", "endless nesting", "too large"],
)
def test_a_broken_file_is_named(tmp_path: Path, data: bytes) -> None:
    """A file that is no TOML, no UTF-8 or too large is a ConfigError with its path and a fix."""
    with pytest.raises(ConfigError, match=r"file\.toml") as caught:
        load(tmp_path, data)
    assert caught.value.fix


def test_a_broken_line_is_named(tmp_path: Path) -> None:
    """A TOML error says at which line."""
    with pytest.raises(ConfigError, match="line 2"):
        load(tmp_path, b"a = 1\nb = = 2\n")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    """A missing file, or a folder, is a ConfigError with its path."""
    for path in (tmp_path / "none.toml", tmp_path):
        with pytest.raises(ConfigError, match=str(path)):
            load_toml(path)


@pytest.mark.parametrize("check", [site_id, run_name, run_id])
@pytest.mark.parametrize(
    "bad",
    [
        "",
        "-a",
        "a-",
        "A",
        "a b",
        "a/b",
        "..",
        "a.b",
        "a" * 64,
        "é",
        "a\n",
        "a\0",
        "alone:",
        "alone:../x",
        "x:y",
        5,
        None,
    ],
)
def test_names_that_could_leave_their_folder_are_refused(check: Callable[[object], str], bad: object) -> None:
    """No separator, dot, capital, blank or control character gets into a name that becomes a path."""
    with pytest.raises(ConfigError, match="is not a valid name"):
        check(bad)


@pytest.mark.parametrize("good", ["a", "7", "hospital-001", "a" * 63])
def test_names_that_are_allowed(good: str) -> None:
    """Lower-case letters, digits and inner hyphens up to 63 make a name; only a run id may be `alone:`."""
    assert site_id(good) == run_name(good) == run_id(good) == good
    assert run_id(f"alone:{good}") == f"alone:{good}"
    with pytest.raises(ConfigError):
        run_name(f"alone:{good}")


MUCH = 600_000
HOSTILE = {
    "a key of many parts": "a." * (MUCH // 2) + "a = 1",
    "a key of many parts, spaced": "a . " * (MUCH // 4) + "a = 1",
    "a key of many quoted parts": '"a".' * (MUCH // 4) + "a = 1",
    "a table of many parts": "[" + "a." * (MUCH // 2) + "a]",
    "many deep tables": "\n".join(f"[{'a.' * 10}b{number}]" for number in range(MUCH // 25)),
    "many dotted keys": "\n".join(f"a.b.c{number} = 1" for number in range(MUCH // 12)),
    "many tables in a list": "[[a]]\n" * (MUCH // 6),
    "a long inline table": "a={" + ",".join(f"b{number}=1" for number in range(MUCH // 8)) + "}",
    "nested lists": "a=" + "[" * (MUCH // 2),
    "nested inline tables": "a=" + "{a=" * (MUCH // 3),
    "parts behind four closing quotes": 'x = """abc"""", ' + "y." * (MUCH // 2) + 'y = 1, z = "',
    "parts behind five closing quotes": 'a = {x = """abc""""", ' + "y." * (MUCH // 2) + "y = 1}",
    "parts behind literal quotes": "a = {x = '''abc''''', " + "y." * (MUCH // 2) + "y = 1}",
}
LONG = {
    "a word": "a" * MUCH,
    "a word and spaces": "a" + " " * MUCH,
    "texts that never end": '"""' + '\\"""x\n' * (MUCH // 6),
    "quotes": '"' * MUCH,
    "single quotes": "'" * MUCH,
    "quotes and backslashes": '"\\' * (MUCH // 2),
    "digits": "a = " + "1" * MUCH,
    "underscores": "a = " + "1_" * (MUCH // 2),
    "a long list": "a = [" + "1," * (MUCH // 2) + "]",
    "escapes": 'a = "' + "\\n" * (MUCH // 2) + '"',
    "comments": "#\n" * (MUCH // 2),
}


def steps(text: str) -> tuple[int, ConfigError | None]:
    """Calls of Python functions while a text is parsed, and what it was refused for."""
    counted = 0

    def count(*_: object) -> None:
        nonlocal counted
        counted += 1

    error = None
    sys.setprofile(count)
    try:
        parse_toml(text, "x.toml")
    except ConfigError as refused:
        error = refused
    finally:
        sys.setprofile(None)
    return counted, error


@pytest.mark.parametrize("case", HOSTILE)
def test_a_structure_that_costs_its_square_is_refused_before_it_is_parsed(case: str) -> None:
    """600 KB of keys, parts or levels: a few calls for each byte at the most, and the reason by name."""
    counted, error = steps(HOSTILE[case])
    assert counted < 2 * MUCH
    assert error is not None
    assert re.search("more than 2000 keys|more than 16 parts|deeper than 32", error.message)


@pytest.mark.parametrize("case", LONG)
def test_long_texts_cost_what_they_are_long(case: str) -> None:
    """Whatever is in them, in twice the text there is twice the work."""
    counted, _ = steps(LONG[case])
    half, _ = steps(LONG[case][: MUCH // 2])
    assert counted <= 2.2 * half + 1000


def test_strings_and_comments_are_no_structure() -> None:
    """Dots, brackets and equal signs in texts are not counted; nor are those after four or five closing quotes."""
    dots = "a." * 50 + "[[[[" * 20 + "=" * 5000
    text = (
        f'a = "{dots}"\nb = \'{dots}\'\nc = """{dots}\n"" \\""" """"\nd = \'\'\'{dots}\'\'\'\'\'\n'
        f'e = "" # {dots}\nf = """{dots}"""""\n'
    )
    assert set(parse_toml(text, "x")) == set("abcdef")


def test_more_fields_than_a_document_has_are_refused() -> None:
    """A table of JSON, too."""
    with pytest.raises(ConfigError, match="fields"):
        declared().from_dict({str(number): 1 for number in range(100_000)}, where="x")
