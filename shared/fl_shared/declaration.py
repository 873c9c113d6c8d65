"""Documents and settings read by declaration: a dataclass says the rules, each wrong field is named with the fix."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING
from functools import cached_property
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Self, TypeVar, Union, get_args, get_origin, get_type_hints

from fl_shared.canonical import canonical_bytes, sha256_hex
from fl_shared.errors import ConfigError, printable, shown
from fl_shared.fields import REFUSED, FieldError, Named, refused
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
        raise refused(f"is {shown(table)}, not a table", "", fault="document")
    if len(table) > MAX_KEYS:
        raise refused(f"has {len(table)} fields", "write the few that the documentation shows", fault="document")
    for name in cls.STATED:
        if name in _rules(cls) and name not in table:
            raise refused("", "", name=name, fault="missing")
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
        raise refused(error.problem, error.fix, name=error.name, fault=fault) from error


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
    loc = [*first["loc"], *([context["name"]] if kind == REFUSED and context["name"] else [])]
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
    if kind == REFUSED:
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
