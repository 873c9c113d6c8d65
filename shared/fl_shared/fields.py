"""Strict reading of tables by declaration: every wrong field is named with its value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Self,
    TypeGuard,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from fl_shared.canonical import DIGEST, HASH, canonical_bytes, check_digest, check_hash, sha256_hex
from fl_shared.errors import ConcordatError, ConfigError, printable, shown
from fl_shared.names import NAME, run_id, run_name, site_id
from fl_shared.toml import MAX_KEYS

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

    F = TypeVar("F", bound=Callable[..., Any])

    def cache(function: F) -> F:
        """mypy takes the class of a dataclass for unhashable."""
        ...
else:
    from functools import cache

SCHEMA_DIALECT = "https://json-schema.org/draft/2020-12/schema"
_TOO_LARGE = 1 << 64
_KNOWN = "concordat"  # the type of the errors that validators of ours raise inside pydantic


class FieldError(Exception):
    """What is wrong with one field: raised by `Document.checked`, told with the place where the document lies."""

    def __init__(self, name: str, problem: str, fix: str) -> None:
        """`name` is the field, or "" where the problem begins with its own place, such as `[aggregation]: ...`."""
        super().__init__(name, problem, fix)
        self.name, self.problem, self.fix = name, problem, fix


def _refused(problem: str, fix: str, *, name: str = "", fault: str = "value") -> Exception:
    from pydantic_core import PydanticCustomError

    context = {"name": name, "problem": printable(problem), "fix": printable(fix), "fault": fault}  # no half surrogates
    return PydanticCustomError(_KNOWN, "refused", context)


def _is_text(value: Any) -> TypeGuard[str]:
    if not isinstance(value, str) or "\0" in value:
        return False
    return value.isascii() or not any("\ud800" <= character <= "\udfff" for character in value)


# The vocabulary of fields. Each is metadata for `Annotated`. pydantic is imported when the first document is read, so
# that `--help` and completion do not wait for it.


@dataclass(frozen=True)
class TextRule:
    """Text without control byte 0 or half surrogates, of `low` to `high` characters; it matches `pattern`, if any.

    `fix` says what to write when the pattern does not match.
    """

    low: int = 1
    high: int = 4096
    pattern: str = ""
    fix: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        def check(value: str) -> str:
            if not _is_text(value):
                raise ValueError("no text")
            if self.pattern and re.fullmatch(self.pattern, value, re.DOTALL) is None:
                raise _refused(f"is {shown(value)}", self.fix)
            return value

        inner = core_schema.str_schema(min_length=self.low, max_length=self.high, strict=True)
        more = {"pydantic_js_updates": {"pattern": f"^{self.pattern}$"}} if self.pattern else {}
        return core_schema.no_info_after_validator_function(check, inner, metadata=more)


@dataclass(frozen=True)
class Whole:
    """A whole number in [low, high]; 2.0 and True are none."""

    low: int
    high: int

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        return core_schema.int_schema(ge=self.low, le=self.high, strict=True)


@dataclass(frozen=True)
class Between:
    """A finite number in [low, high]; `above`/`below` exclude the ends. Whole numbers are taken and become floats."""

    low: float = -math.inf
    high: float = math.inf
    above: bool = False
    below: bool = False

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        ends = {"gt" if self.above else "ge": self.low, "lt" if self.below else "le": self.high}
        ends = {name: float(end) for name, end in ends.items() if math.isfinite(end)}
        inner = core_schema.float_schema(strict=True, allow_inf_nan=False, **ends)  # type: ignore[arg-type]  # by name

        def check(value: Any) -> Any:
            if isinstance(value, int) and abs(value) > _TOO_LARGE:  # a float would be another number
                raise ValueError("too large")
            return value

        return core_schema.no_info_before_validator_function(check, inner, json_schema_input_schema=inner)


@dataclass(frozen=True)
class Choice:
    """One of a few words."""

    options: Sequence[str]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        return core_schema.literal_schema(list(self.options))


@dataclass(frozen=True)
class Named:
    """A text that `check` accepts; it raises a ConcordatError otherwise. `pattern` says the same in JSON Schema."""

    check: Callable[[object], Any]
    pattern: str = ""
    what: str = "a name"

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        def check(value: object) -> Any:
            try:
                return self.check(value)
            except ConcordatError as error:
                why = f": {error.message}" if error.message else ""
                raise _refused(f"is {shown(value)}{why}", error.fix) from error

        return core_schema.no_info_plain_validator_function(
            check, json_schema_input_schema=core_schema.str_schema(pattern=self.pattern or None)
        )


@dataclass(frozen=True)
class Texts:
    """A list of `low` to `high` different texts; one of `options`, or such that `check` accepts, each."""

    low: int = 1
    high: int = 10_000
    options: Sequence[str] = ()
    check: Callable[[object], Any] | None = None
    pattern: str = ""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        item: Any = core_schema.str_schema(min_length=1, max_length=512, pattern=self.pattern or None)
        if self.options:
            item = core_schema.literal_schema(list(self.options))
        shape = core_schema.list_schema(item, min_length=self.low, max_length=self.high)
        return core_schema.no_info_plain_validator_function(
            self._read, json_schema_input_schema=shape, metadata={"pydantic_js_updates": {"uniqueItems": True}}
        )

    def _read(self, value: Any) -> tuple[Any, ...]:
        if (
            not isinstance(value, list | tuple)
            or not self.low <= len(value) <= self.high
            or not all(_is_text(item) and 0 < len(item) <= 512 for item in value)
        ):
            raise ValueError("no list of texts")
        if len(set(value)) != len(value):
            (twice, _), *_ = Counter(value).most_common(1)
            raise _refused(f"names {shown(twice)} twice", "name each once")
        for item in value:
            if self.options and item not in self.options:
                raise _refused(f"names {shown(item)}", f"choose from {', '.join(self.options)}")
        return tuple(value) if self.check is None else tuple(self._checked(self.check, item) for item in value)

    @staticmethod
    def _checked(check: Callable[[object], Any], text: str) -> Any:
        try:
            return check(text)
        except ConcordatError as error:
            raise _refused(f"names {shown(text)}: {error.message}", error.fix) from error


@dataclass(frozen=True)
class OneOf:
    """A table whose fields another field decides: read as its items, to be read again as one of `kinds`."""

    kinds: Sequence[type[Document]]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        def items(value: Any) -> tuple[tuple[Any, Any], ...]:
            if not isinstance(value, Mapping):
                raise _refused(f"is {shown(value)}, not a table", "", fault="document")
            return tuple(value.items())

        kinds = core_schema.union_schema([handler.generate_schema(kind) for kind in dict.fromkeys(self.kinds)])
        return core_schema.no_info_plain_validator_function(items, json_schema_input_schema=kinds)


@dataclass(frozen=True)
class PathRule:
    """A path; `~` is expanded, and a relative one starts at the folder that the document was read from."""

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        return core_schema.with_info_plain_validator_function(
            self._read,
            json_schema_input_schema=core_schema.str_schema(
                min_length=1, metadata={"pydantic_js_updates": {"format": "path"}}
            ),
        )

    @staticmethod
    def _read(value: Any, info: Any) -> Path:
        if not isinstance(value, str | Path) or not str(value) or not _is_text(str(value)):
            raise ValueError("no path")
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            raise _refused(f"is {shown(value)}", "name a user that exists after ~") from None
        base = info.context
        return path if path.is_absolute() or base is None else base / path


Text = Annotated[str, TextRule()]
MaybeEmpty = Annotated[str, TextRule(low=0)]
Time = Annotated[float, Between(low=0)]
"""Unix seconds."""
PathField = Annotated[Path, PathRule()]
SiteName = Annotated[str, Named(site_id, f"^{NAME}$")]
RunName = Annotated[str, Named(run_name, f"^{NAME}$")]
RunId = Annotated[str, Named(run_id, f"^(alone:)?{NAME}$")]
Digest = Annotated[str, Named(check_digest, f"^{DIGEST}$")]
Hash = Annotated[str, Named(check_hash, f"^{HASH}$")]


class Document:
    """A frozen, strict table of declared fields: what a TOML section or a signed body may hold.

    A subclass is a frozen dataclass whose annotations are the rules; pydantic reads by them, JSON Schema is made of
    them, and `to_dict` writes by them. Making one in code checks nothing: a reader checks what others wrote.
    """

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]
    WHERE: ClassVar[str] = "document"
    STATED: ClassVar[tuple[str, ...]] = ("kind",)
    """Fields that have a default in code, and must be written out in a document all the same."""
    SECTIONS: ClassVar[bool] = False
    """Whether it is a TOML file: errors say `spec.toml [run]`, and an optional table left out is an empty one."""
    SCHEMA: ClassVar[dict[str, Any]] = {}
    """What JSON Schema should say beside the fields: what `checked` demands, as far as it can be said."""
    __pydantic_config__: ClassVar[dict[str, Any]] = {
        "strict": True,
        "extra": "forbid",
        "use_attribute_docstrings": True,
    }

    @classmethod
    def from_dict(cls, table: Any, *, where: str = "", base: Path | None = None) -> Self:
        """Read and check a table; ConfigError names the field, its value and the fix.

        Args:
            table: as a TOML or JSON parser gives it.
            where: how errors call it, for example the path of the file.
            base: the folder that relative paths start from.
        """
        from pydantic import ValidationError

        try:
            return _adapter(cls).validate_python(table, context=base)  # type: ignore[no-any-return]  # cached by class
        except ValidationError as error:
            raise config_error(error, cls, table, where or cls.WHERE) from None

    def checked(self) -> Self:
        """What holds between fields, after each was read: raises FieldError, or returns the document to use."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what `from_dict` reads back to an equal document."""
        kind = {"kind": ""} if "kind" in _rules(type(self)) else {}
        return kind | {name: _plain(getattr(self, name), rule) for name, rule in _rules(type(self)).items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        schema: dict[str, Any] = handler(core_schema)
        table = handler.resolve_ref_schema(schema)
        table |= cls.SCHEMA
        if stated := [name for name in cls.STATED if name in table["properties"]]:
            table["required"] = list(dict.fromkeys([*table.get("required", ()), *stated]))
            for name in stated:
                table["properties"][name].pop("default", None)
        for field in table["properties"].values():
            if {"type": "null"} in field.get("anyOf", ()):  # TOML has no null
                (only,) = (option for option in field.pop("anyOf") if option != {"type": "null"})
                field |= only
            if field.get("default", "") in (None, "", [], field.get("exclusiveMinimum")):  # means "left out"
                field.pop("default", None)
        return schema

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        inner = handler(source)
        handler.resolve_ref_schema(inner)["strict"] = False  # a table is read, its fields are strict
        checked = core_schema.no_info_after_validator_function(_check_document, inner)
        return core_schema.no_info_before_validator_function(
            functools.partial(_check_table, cls), checked, json_schema_input_schema=inner
        )


class Digested(Document):
    """A document that others name by its digest."""

    @cached_property
    def canonical(self) -> str:
        """The document's canonical JSON; computed once."""
        return canonical_bytes(self.to_dict()).decode()

    @cached_property
    def digest(self) -> str:
        """`sha256:` and the SHA-256 of the document's canonical bytes; computed once."""
        return f"sha256:{sha256_hex(self.canonical.encode())}"


def _check_table(cls: type[Document], table: Any) -> dict[Any, Any]:
    if not isinstance(table, Mapping):
        raise _refused(f"is {shown(table)}, not a table", "", fault="document")
    if len(table) > MAX_KEYS:
        raise _refused(f"has {len(table)} fields", "write the few that the documentation shows", fault="document")
    for name in cls.STATED:
        if name in _rules(cls) and name not in table:
            raise _refused("", "", name=name, fault="missing")
    optional = [
        name
        for name, field in cls.__dataclass_fields__.items()
        if cls.SECTIONS and field.default_factory is not MISSING and _is_document(_rules(cls)[name])
    ]
    return {name: {} for name in optional} | dict(table)


def _check_document(document: Document) -> Document:
    try:
        return document.checked()
    except FieldError as error:
        fault = "value" if error.name else "document"
        raise _refused(error.problem, error.fix, name=error.name, fault=fault) from error


def _plain(value: Any, rule: Any) -> Any:
    if isinstance(value, Document):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(item, None) for item in value]
    return float(value) if _base_type(rule) is float and value is not None else value


def _base_type(rule: Any) -> Any:
    """The type of a field without its rules and without None."""
    while get_origin(rule) is Annotated:
        rule = get_args(rule)[0]
    if get_origin(rule) in (Union, UnionType):
        (rule,) = (option for option in get_args(rule) if option is not NoneType)
        return _base_type(rule)
    return rule


@cache
def _rules(cls: type[Document]) -> dict[str, Any]:
    """The fields of a document and their annotations, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(cls)}


@cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@cache
def json_schema(cls: type[Document]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a document, made of its declaration."""
    return {"$schema": SCHEMA_DIALECT, **_adapter(cls).json_schema(mode="validation")}


def shipped_schema(cls: type[Document]) -> str:
    """The text of the JSON Schema that ships with a file's declaration; `make schemas` writes it."""
    return f"{json.dumps(json_schema(cls), indent=2)}\n"


def require_fields(document: Document) -> None:
    """ConfigError unless the document's fields are as declared: for those that are checked when they are made."""
    values = {name: getattr(document, name) for name in _rules(type(document))}
    _twin(type(document)).from_dict(values, where=document.WHERE)


@cache
def _twin(cls: type[Document]) -> type[Document]:
    """The same fields in a class that does nothing when it is made."""
    fields = [(name, rule) for name, rule in _rules(cls).items()]
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(Document,), frozen=True)


def config_error(error: ValidationError, cls: type[Document], table: Any, where: str) -> ConfigError:
    """The ConfigError for pydantic's first error: where, field, value, and what to write, from the declaration."""
    errors = error.errors(include_url=False)
    first = min(errors, key=lambda problem: problem["loc"][-1:] != ("kind",))  # another kind is refused as such
    kind, context = first["type"], first.get("ctx", {})
    loc = [*first["loc"], *([context["name"]] if kind == _KNOWN and context["name"] else [])]
    of_table = kind == "string_unicode" or context.get("fault") == "document"  # what is wrong may be a table, no field
    while loc and _is_document(_rules(cls).get(str(loc[0]))) and (len(loc) > 1 or of_table):
        name = str(loc.pop(0))
        where = f"{where} [{name}]" if cls.SECTIONS else f"{where} {name}"
        cls, table = _base_type(_rules(cls)[name]), table[name]
    if context.get("fault") == "document":
        where += "".join(f" [{name}]" for name in loc)
        return ConfigError(f"{where} {context['problem']}", fix=context["fix"] or f"write {where} as a table of fields")
    known = list(_rules(cls))
    if not loc or loc[0] not in known:
        name = str(loc[0] if loc else next(key for key in table if key not in known))[:80]
        return ConfigError(f"{where}: {printable(name)} is not a field here", fix=_nearest(name, known))
    name = str(loc[0])
    shape = _shape(cls, name)
    if kind == "missing" or context.get("fault") == "missing":
        near = difflib.get_close_matches(name, {str(key) for key in table} - set(known), n=1)
        hint = f"; did you mean it by {near[0]!r}?" if near else ""
        return ConfigError(f"{where}: {name} is missing{hint}", fix=f"add {name}: {shape}")
    if kind == _KNOWN:
        return ConfigError(f"{where}: {name} {context['problem']}", fix=context["fix"])
    value, hint = table[name], ""
    if kind == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value[:200], shape.removeprefix("one of ").split(", "), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{where}: {name} is {shown(value)}{hint}", fix=f"write {shape}")


def _is_document(rule: Any) -> bool:
    return isinstance(bare := _base_type(rule), type) and issubclass(bare, Document)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:200], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"


def _shape(cls: type[Document], name: str) -> str:
    """What a field may hold, in words, from its JSON Schema: `a whole number from 1 to 9`."""
    schema = json_schema(cls)
    schema = schema.get("$defs", {}).get(schema.get("$ref", "").rpartition("/")[2], schema)["properties"][name]
    if words := schema.get("enum", [schema["const"]] if "const" in schema else []):
        return f"one of {', '.join(words)}"
    low = schema.get("minimum", schema.get("exclusiveMinimum", -math.inf))
    high = schema.get("maximum", schema.get("exclusiveMaximum", math.inf))
    match schema.get("type"):
        case "integer":
            return f"a whole number from {low} to {high}"
        case "number":
            above = "above" if "exclusiveMinimum" in schema else "from"
            return f"a number {above} {low:g} {'and below' if 'exclusiveMaximum' in schema else 'to'} {high:g}"
        case "boolean":
            return "true or false"
        case "array":
            return f"a list of {schema.get('minItems', 0)} to {schema['maxItems']} texts"
        case "string":
            named = [rule.what for rule in get_args(_rules(cls)[name])[1:] if isinstance(rule, Named)]
            return "a path in quotes" if schema.get("format") == "path" else "".join(named) or "a text in quotes"
        case _:
            return "a table"
