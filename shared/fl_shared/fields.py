"""The vocabulary of declared fields: what a number, a text, a name, a path may be, in pydantic and JSON Schema."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import (
    Annotated,
    Any,
    TypeGuard,
)

from fl_shared.canonical import DIGEST, HASH, check_digest, check_hash
from fl_shared.errors import ConcordatError, printable, shown
from fl_shared.names import NAME, run_id, run_name, site_id

_TOO_LARGE = 1 << 64
REFUSED = "concordat"  # the type of the errors that validators of ours raise inside pydantic


class FieldError(Exception):
    """What is wrong with one field: raised by `Document.checked`, told with the place where the document lies."""

    def __init__(self, name: str, problem: str, fix: str) -> None:
        """`name` is the field, or "" where the problem begins with its own place, such as `[aggregation]: ...`."""
        super().__init__(name, problem, fix)
        self.name, self.problem, self.fix = name, problem, fix


def refused(problem: str, fix: str, *, name: str = "", fault: str = "value") -> Exception:
    """The error for pydantic to carry from a validator of ours to `fl_shared.declaration.config_error`."""
    from pydantic_core import PydanticCustomError

    context = {"name": name, "problem": printable(problem), "fix": printable(fix), "fault": fault}  # no half surrogates
    return PydanticCustomError(REFUSED, "refused", context)


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
                raise refused(f"is {shown(value)}", self.fix)
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
                raise refused(f"is {shown(value)}{why}", error.fix) from error

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
            raise refused(f"names {shown(twice)} twice", "name each once")
        for item in value:
            if self.options and item not in self.options:
                raise refused(f"names {shown(item)}", f"choose from {', '.join(self.options)}")
        return tuple(value) if self.check is None else tuple(self._checked(self.check, item) for item in value)

    @staticmethod
    def _checked(check: Callable[[object], Any], text: str) -> Any:
        try:
            return check(text)
        except ConcordatError as error:
            raise refused(f"names {shown(text)}: {error.message}", error.fix) from error


@dataclass(frozen=True)
class OneOf:
    """A table whose fields another field decides: read as its items, to be read again as one of `kinds`."""

    kinds: Sequence[type]

    def __get_pydantic_core_schema__(self, source: Any, handler: Any) -> Any:  # pydantic's signature
        from pydantic_core import core_schema

        def items(value: Any) -> tuple[tuple[Any, Any], ...]:
            if not isinstance(value, Mapping):
                raise refused(f"is {shown(value)}, not a table", "", fault="document")
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
            raise refused(f"is {shown(value)}", "name a user that exists after ~") from None
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
