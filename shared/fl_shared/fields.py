"""Strict reading of TOML and JSON by declaration: every wrong field is named with its value and the fix."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import re
import tomllib
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
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

from fl_shared.canonical import DIGEST, HASH, check_digest, check_hash, document_digest
from fl_shared.errors import ConcordatError, ConfigError, shown
from fl_shared.names import NAME, run_id, run_name, site_id

if TYPE_CHECKING:
    from pydantic import TypeAdapter, ValidationError

_MAX_BYTES = 1 << 20
MAX_KEYS, MAX_PARTS, MAX_DEPTH = 2000, 16, 32
# What holds text in TOML 1.0: multi-line strings (up to two quotes may stand before the closing three), strings,
# comments. Possessive, and what is not closed goes to its end, so that no text makes the search go back.
_TEXT = re.compile(
    r'''"""(?:[^"\\]|\\.|"(?!""))*+(?:"{3,5}|\Z)|\'{3}(?:[^']|'(?!''))*+(?:'{3,5}|\Z)'''
    r"""|"(?:[^"\\\n]|\\.)*+"?|'[^'\n]*+'?|\#[^\n]*+""",
    re.DOTALL,
)
_DOTS = re.compile(r"(?<![\w\-])(?:[\w\-]++[ \t]*+\.[ \t]*+){16}")  # MAX_PARTS
_TABLE = re.compile(r"^[ \t]*+\[", re.MULTILINE)
_MISSING: Any = object()


def load_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file of at most 1 MiB; ConfigError names the file and the line."""
    try:
        with path.open("rb") as source:
            data = source.read(_MAX_BYTES + 1)
        text = data.decode()
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}", fix="check the path") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text", fix="save the file as UTF-8") from error
    return parse_toml(text, str(path))


def parse_toml(text: str, where: str) -> dict[str, Any]:
    """Parse TOML text of at most 1 MiB; ConfigError names `where` and the line."""
    if len(text) > _MAX_BYTES:
        raise ConfigError(f"{where} is larger than 1 MiB", fix="a configuration is a small file")
    _require_modest(text, where)
    try:
        return tomllib.loads(text.removeprefix("\ufeff"))  # a byte order mark, as Windows editors write it
    except (ValueError, RecursionError) as error:  # also numbers of thousands of digits, endless nesting
        raise ConfigError(f"{where}: {error}", fix="mend the TOML at that place") from error


def _require_modest(text: str, where: str) -> None:
    """ConfigError for a structure that no configuration has: tomllib's work grows with keys times their parts.

    One pass over the text, without a parser: strings and comments are blanked out, the rest is counted. Up to the
    first place that is no TOML, where tomllib stops, this reads the text as tomllib does.
    """
    bare = _TEXT.sub("t", text)
    depth = deepest = 0
    for bracket in re.findall(r"[\[\]{}]", bare):
        depth += 1 if bracket in "[{" else -1
        deepest = max(deepest, depth)
    keys = bare.count("=") + len(_TABLE.findall(bare))
    for what, much in (
        (f"has more than {MAX_KEYS} keys and tables", keys > MAX_KEYS),
        (f"has a key of more than {MAX_PARTS} parts", _DOTS.search(bare) is not None),
        (f"is nested deeper than {MAX_DEPTH} levels", deepest > MAX_DEPTH),
    ):
        if much:
            raise ConfigError(f"{where} {what}", fix="write the few tables that the documentation shows")


T = TypeVar("T")
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

    return PydanticCustomError(_KNOWN, "refused", {"name": name, "problem": problem, "fix": fix, "fault": fault})


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and "\0" not in value and not any("\ud800" <= c <= "\udfff" for c in value)


# The vocabulary of fields. Each is metadata for `Annotated`. pydantic is imported when the first document is read, so
# that `--help` and completion do not wait for it.


@dataclass(frozen=True)
class TextRule:
    """Text without control byte 0 or half surrogates, of `low` to `high` characters."""

    low: int = 1
    high: int = 4096

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        def check(value: str) -> str:
            if not _is_text(value):
                raise ValueError("no text")
            return value

        inner = core_schema.str_schema(min_length=self.low, max_length=self.high, strict=True)
        return core_schema.no_info_after_validator_function(check, inner)


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

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        def check(value: object) -> Any:
            try:
                return self.check(value)
            except ConcordatError as error:
                raise _refused(f"is {shown(value)}: {error.message}", error.fix) from error

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
            or not all(_is_text(each) and 0 < len(each) <= 512 for each in value)
        ):
            raise ValueError("no list of texts")
        if len(set(value)) != len(value):
            (twice, _), *_ = Counter(value).most_common(1)
            raise _refused(f"names {shown(twice)} twice", "name each once")
        for each in value:
            if self.options and each not in self.options:
                raise _refused(f"names {shown(each)}", f"choose from {', '.join(self.options)}")
        return tuple(value) if self.check is None else tuple(self._checked(self.check, each) for each in value)

    @staticmethod
    def _checked(check: Callable[[object], Any], text: str) -> Any:
        try:
            return check(text)
        except ConcordatError as error:
            raise _refused(f"names {shown(text)}: {error.message}", error.fix) from error


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


@dataclass(frozen=True)
class Document:
    """A frozen, strict table of declared fields: what a TOML section or a signed body may hold.

    A subclass is a frozen dataclass whose annotations are the rules; pydantic reads by them, JSON Schema is made of
    them, and `to_dict` writes by them. Making one in code checks nothing: a reader checks what others wrote.
    """

    WHERE: ClassVar[str] = "document"
    STATED: ClassVar[tuple[str, ...]] = ("kind",)
    """Fields that have a default in code, and must be written out in a document all the same."""
    SECTIONS: ClassVar[bool] = False
    """Whether errors name its tables as those of TOML: `spec.toml [run]`."""
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
            raise told(error, cls, table, where or cls.WHERE) from None

    def checked(self) -> Self:
        """What holds between fields, after each was read: raises FieldError, or returns the document to use."""
        return self

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values: what `from_dict` reads back to an equal document."""
        kind = {"kind": ""} if "kind" in _rules(type(self)) else {}
        return kind | {name: _plain(getattr(self, name), rule) for name, rule in _rules(type(self)).items()}

    @classmethod
    def __get_pydantic_json_schema__(cls, core_schema: Any, handler: Any) -> dict[str, Any]:
        made: dict[str, Any] = handler(core_schema)
        table = handler.resolve_ref_schema(made)
        if stated := [name for name in cls.STATED if name in table["properties"]]:
            table["required"] = [*table.get("required", ()), *stated]
            for name in stated:
                table["properties"][name].pop("default", None)
        return made

    @classmethod
    def __get_pydantic_core_schema__(cls, source: Any, handler: Any) -> Any:
        from pydantic_core import core_schema

        inner = handler(source)
        handler.resolve_ref_schema(inner)["strict"] = False  # a table is read, its fields are strict
        checked = core_schema.no_info_after_validator_function(_after, inner)
        return core_schema.no_info_before_validator_function(
            functools.partial(_before, cls), checked, json_schema_input_schema=inner
        )


class Digested(Document):
    """A document that others name by its digest."""

    @cached_property
    def digest(self) -> str:
        """`sha256:` and the SHA-256 of the document's canonical bytes; computed once."""
        return document_digest(self.to_dict())


def _before(cls: type[Document], table: Any) -> dict[Any, Any]:
    if not isinstance(table, Mapping):
        raise _refused(f"is {shown(table)}, not a table", "", fault="document")
    if len(table) > MAX_KEYS:
        raise _refused(f"has {len(table)} fields", "write the few that the documentation shows", fault="document")
    for name in cls.STATED:
        if name in _rules(cls) and name not in table:
            raise _refused("", "", name=name, fault="missing")
    return dict(table)


def _after(document: Document) -> Document:
    try:
        return document.checked()
    except FieldError as error:
        fault = "value" if error.name else "document"
        raise _refused(error.problem, error.fix, name=error.name, fault=fault) from error


def _plain(value: Any, rule: Any) -> Any:
    if isinstance(value, Document):
        return value.to_dict()
    if isinstance(value, list | tuple):
        return [_plain(each, None) for each in value]
    return float(value) if _bare(rule) is float and value is not None else value


def _bare(rule: Any) -> Any:
    """The type of a field without its rules and without None."""
    while get_origin(rule) is Annotated:
        rule = get_args(rule)[0]
    if get_origin(rule) in (Union, UnionType):
        (rule,) = (each for each in get_args(rule) if each is not NoneType)
        return _bare(rule)
    return rule


@functools.cache
def _rules(cls: type[Document]) -> dict[str, Any]:
    """The fields of a document and their annotations, in order."""
    hints = get_type_hints(cls, include_extras=True)
    return {each.name: hints[each.name] for each in dataclasses.fields(cls)}


@functools.cache
def _adapter(cls: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(cls)


@functools.cache
def json_schema(cls: type[Document]) -> dict[str, Any]:
    """The JSON Schema (2020-12) of a document, made of its declaration."""
    made = _adapter(cls).json_schema(mode="validation")
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **made}


def require_fields(document: Document) -> None:
    """ConfigError unless the document's fields are as declared: for those that are checked when they are made."""
    values = {name: getattr(document, name) for name in _rules(type(document))}
    _twin(type(document)).from_dict(values, where=document.WHERE)


@functools.cache
def _twin(cls: type[Document]) -> type[Document]:
    """The same fields in a class that does nothing when it is made."""
    fields = [(name, rule) for name, rule in _rules(cls).items()]
    return dataclasses.make_dataclass(cls.__name__, fields, bases=(Document,), frozen=True)


def told(error: ValidationError, cls: type[Document], table: Any, where: str) -> ConfigError:
    """The first error of pydantic in our words: where, field, value, and what to write, taken from the declaration."""
    first = error.errors(include_url=False)[0]
    context = first.get("ctx", {})
    loc = [*first["loc"], *([context["name"]] if first["type"] == _KNOWN and context["name"] else [])]
    while loc and _is_document(rule := _rules(cls).get(str(loc[0]))) and (len(loc) > 1 or first["type"] == _KNOWN):
        if len(loc) == 1 and context.get("fault") != "document":
            break
        name = str(loc.pop(0))
        where = f"{where} [{name}]" if cls.SECTIONS else f"{where} {name}"
        cls, table = _bare(rule), table[name]
    if context.get("fault") == "document":
        return ConfigError(f"{where} {context['problem']}", fix=context["fix"] or f"write {where} as a table of fields")
    known = list(_rules(cls))
    if first["type"] in ("unexpected_keyword_argument", "invalid_key", "string_unicode") and (
        not loc or loc[0] not in known
    ):
        name = str(loc[0] if loc else next(each for each in table if each not in known))
        return ConfigError(f"{where}: {name[:80]} is not a field here", fix=_nearest(name, known))
    name = str(loc[0])
    shape = _shape(cls, name)
    if first["type"] == "missing" or context.get("fault") == "missing":
        near = difflib.get_close_matches(name, {str(key) for key in table} - set(known), n=1)
        hint = f"; did you mean it by {near[0]!r}?" if near else ""
        return ConfigError(f"{where}: {name} is missing{hint}", fix=f"add {name}: {shape}")
    if first["type"] == _KNOWN:
        return ConfigError(f"{where}: {name} {context['problem']}", fix=context["fix"])
    value, hint = table[name], ""
    if first["type"] == "literal_error" and isinstance(value, str):
        near = difflib.get_close_matches(value[:200], shape.removeprefix("one of ").split(", "), n=1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
    return ConfigError(f"{where}: {name} is {shown(value)}{hint}", fix=f"write {shape}")


def _is_document(rule: Any) -> bool:
    return isinstance(bare := _bare(rule), type) and issubclass(bare, Document)


def _nearest(name: str, known: Sequence[str]) -> str:
    near = difflib.get_close_matches(name[:200], known, n=1)
    return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(known))}"


def _shape(cls: type[Document], name: str) -> str:
    """What a field may hold, in words, from its JSON Schema: `a whole number from 1 to 9`."""
    schema = json_schema(cls)
    schema = schema.get("$defs", {}).get(schema.get("$ref", "").rpartition("/")[2], schema)["properties"][name]
    schema = next((each for each in schema.get("anyOf", ()) if each.get("type") != "null"), schema)
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
            named = "a name" if "pattern" in schema else "a text in quotes"
            return "a path in quotes" if schema.get("format") == "path" else named
        case _:
            return "a table"


class Fields:
    """One table of a configuration, read field by field; `done()` refuses what was not asked for.

    Args:
        table: the parsed table.
        where: how errors call it, for example `site.toml [policy]`.
        base: the folder that relative paths start from.
        environ: environment variables that win over the table, none by default. Field `path` of section
            `data` is then `PREFIX_DATA_PATH`; texts stand there as they are, other values as in TOML.
        prefix: the PREFIX, for example `FL_CLIENT`.
    """

    def __init__(
        self,
        table: Any,
        where: str,
        *,
        base: Path | None = None,
        environ: Mapping[str, str] | None = None,
        prefix: str = "FL",
    ) -> None:
        if not isinstance(table, Mapping):
            raise ConfigError(f"{where} is {shown(table)}, not a table", fix=f"write {where} as a table of fields")
        if len(table) > MAX_KEYS:
            raise ConfigError(f"{where} has {len(table)} fields", fix="write the few that the documentation shows")
        self._table = dict(table)
        self._where = where
        self._base = base
        self._environ = environ or {}
        self._prefix = prefix
        self._nested = False
        self._sections: tuple[str, ...] = ()
        self._asked: set[str] = set()

    def _variable(self, name: str) -> str:
        return f"{self._prefix}_{name}".upper().replace("-", "_")

    def fail(self, name: str, problem: str, fix: str) -> ConfigError:
        """The error for one field; the caller raises it."""
        variable = self._variable(name)
        if variable in self._environ:
            return ConfigError(f"environment: {variable} {problem}", fix=fix)
        return ConfigError(f"{self._where}: {name} {problem}", fix=fix)

    def _take(self, name: str, default: Any, fix: str, *, plain: bool = False) -> Any:
        self._asked.add(name)
        raw = self._environ.get(self._variable(name))
        if raw is not None:
            if plain:
                return raw
            try:
                (value,) = parse_toml(f"value = {raw}", name).values()
            except (ConfigError, ValueError):
                raise self.fail(name, f"is {shown(raw)}", f"write {fix}, as in TOML") from None
            return value
        if name in self._table:
            return self._table[name]
        if default is _MISSING:
            near = difflib.get_close_matches(name, {str(key) for key in self._table} - self._asked, n=1)
            hint = f"; did you mean it by {near[0]!r}?" if near else ""
            raise self.fail(name, f"is missing{hint}", f"add {name}: {fix}")
        return default

    def section(self, name: str, *, optional: bool = False) -> Fields:
        """A nested table; with `optional`, an empty one when it is absent."""
        self._asked.add(name)
        variable = self._variable(name)
        self._sections += (f"{variable}_",)
        if name in self._table:
            value = self._table[name]
        elif optional or any(each.startswith(f"{variable}_") for each in self._environ):
            value = {}
        else:
            value = self._take(name, _MISSING, "a table")
        made = Fields(value, f"{self._where} [{name}]", base=self._base, environ=self._environ, prefix=variable)
        made._nested = True
        return made

    def text(self, name: str, *, default: Any = _MISSING, empty: bool = False) -> str:
        """A text of at most 4096 characters."""
        value = self._take(name, default, "a text in quotes", plain=True)
        if value is default and default is not _MISSING:
            return value  # type: ignore[no-any-return]  # the caller's own default
        if not _is_text(value) or (not value and not empty) or len(value) > 4096:
            raise self.fail(name, f"is {shown(value)}", "write a text in quotes")
        return value

    def named(self, name: str, check: Callable[[object], T]) -> T:
        """A field that `check` accepts (it raises a ConcordatError otherwise)."""
        value = self._take(name, _MISSING, "a name", plain=True)
        try:
            return check(value)
        except ConcordatError as error:
            raise self.fail(name, f"is {shown(value)}: {error.message}", error.fix) from error

    def boolean(self, name: str, *, default: Any = _MISSING) -> bool:
        """true or false."""
        value = self._take(name, default, "true or false")
        if not isinstance(value, bool):
            raise self.fail(name, f"is {shown(value)}", "write true or false")
        return value

    def integer(self, name: str, *, low: int, high: int, default: Any = _MISSING) -> int:
        """A whole number in [low, high]."""
        value = self._take(name, default, f"a whole number from {low} to {high}")
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.fail(name, f"is {shown(value)}", f"write a whole number from {low} to {high}")
        return value

    def number(
        self,
        name: str,
        *,
        low: float = -math.inf,
        high: float = math.inf,
        above: bool = False,
        below: bool = False,
        default: Any = _MISSING,
    ) -> float:
        """A finite number between low and high; `above`/`below` exclude the ends."""
        bounds = f"{'above' if above else 'from'} {low:g} {'and below' if below else 'to'} {high:g}"
        value = self._take(name, default, f"a number {bounds}")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.fail(name, f"is {shown(value)}", f"write a number {bounds}")
        if isinstance(value, int) and abs(value) > 1 << 64:  # beyond what a float takes, comparing would raise
            raise self.fail(name, f"is {shown(value)}", f"write a number {bounds}")
        if (
            not math.isfinite(value)
            or value < low
            or value > high
            or (above and value == low)
            or (below and value == high)
        ):
            raise self.fail(name, f"is {shown(value)}", f"write a number {bounds}")
        return float(value)

    def choice(self, name: str, options: Sequence[str], *, default: Any = _MISSING) -> str:
        """One of the options."""
        value = self._take(name, default, f"one of {', '.join(options)}", plain=True)
        if value not in options:
            near = difflib.get_close_matches(str(value)[:200], options, n=1) if isinstance(value, str) else []
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise self.fail(name, f"is {shown(value)}{hint}", f"write one of {', '.join(options)}")
        return str(value)

    def texts(self, name: str, *, low: int = 1, high: int = 10_000, default: Any = _MISSING) -> tuple[str, ...]:
        """A list of different, non-empty texts."""
        value = self._take(name, default, "a list of texts")
        if (
            not isinstance(value, list | tuple)
            or not low <= len(value) <= high
            or not all(_is_text(each) and 0 < len(each) <= 512 for each in value)
        ):
            raise self.fail(name, f"is {shown(value)}", f"write a list of {low} to {high} texts")
        if len(set(value)) != len(value):
            (twice, _), *_ = Counter(value).most_common(1)
            raise self.fail(name, f"names {shown(twice)} twice", "name each once")
        return tuple(value)

    def path(self, name: str, *, default: Any = _MISSING) -> Path:
        """A path; `~` is expanded and a relative one starts at the file's folder."""
        value = self._take(name, default, "a path in quotes", plain=True)
        if not isinstance(value, str | Path) or not str(value) or not _is_text(str(value)):
            raise self.fail(name, f"is {shown(value)}", "write a path in quotes")
        try:
            path = Path(value).expanduser()
        except RuntimeError:
            raise self.fail(name, f"is {shown(value)}", "name a user that exists after ~") from None
        return path if path.is_absolute() or self._base is None else self._base / path

    def table(self, name: str) -> dict[str, Any]:
        """A nested table as it stands."""
        value = self._take(name, _MISSING, "a table")
        if not isinstance(value, dict):
            raise self.fail(name, f"is {shown(value)}", "write a table")
        return value

    def has(self, name: str) -> bool:
        """Whether the field is given."""
        return name in self._table or self._variable(name) in self._environ

    def done(self) -> None:
        """Refuse fields, and variables of this section, that nobody asked for, with the nearest known name."""
        for name in self._table:
            if name not in self._asked:
                raise self.fail(str(name)[:80], "is not a field here", self._nearest(str(name)))
        start = f"{self._prefix}_"
        known = {self._variable(name) for name in self._asked}
        for variable in self._environ:
            if not self._nested or not variable.startswith(start) or variable.startswith(self._sections):
                continue  # at the top, other variables share the prefix, such as the home's
            if variable not in known:
                name = variable.removeprefix(start).lower()
                raise self.fail(name, "is not a field here", self._nearest(name))

    def _nearest(self, name: str) -> str:
        near = difflib.get_close_matches(name[:200], self._asked, n=1)
        return f"did you mean {near[0]!r}?" if near else f"known here: {', '.join(sorted(self._asked))}"
