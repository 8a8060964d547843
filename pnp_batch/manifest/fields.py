"""The kinds of value that a manifest holds: frozen mappings, numbers within bounds, text that a file can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError


class Value(BaseModel):
    """A frozen value that refuses unknown keys and understands aliases."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())
    aliases: ClassVar[Mapping[str, str]] = {}

    @model_validator(mode="before")
    @classmethod
    def _rename(cls, data: Any) -> Any:
        return renamed(data, cls.aliases)

    def given(self) -> dict[str, Any]:
        """The fields that were written, without the defaults; in a fixed order, for files that are written from them."""
        written = self.model_fields_set  # a set, whose order changes from process to process
        return {name: getattr(self, name) for name in type(self).model_fields if name in written}


def renamed(data: Any, aliases: Mapping[str, str]) -> Any:
    """Replaces alias keys in a mapping by ours; a key given under two names is an error, not a lottery."""
    if not isinstance(data, Mapping):
        return data
    written: dict[Any, str] = {}
    for key in data:
        other = written.setdefault(aliases.get(key, key), key)
        if other is not key:
            raise given_twice(key, other)
    return {name: data[key] for name, key in written.items()}


def given_twice(key: str, other: str) -> PydanticCustomError:
    """What is wrong with a setting that is written twice."""
    return PydanticCustomError(
        "given_twice", "'{key}' and '{other}' are the same setting", {"key": key, "other": other}
    )


def _no_boolean(value: Any) -> Any:
    """YAML 1.1 reads a bare `on` as true, which would pass for the number 1."""
    if isinstance(value, bool):
        raise PydanticCustomError("boolean", "this should be a number")
    return value


def writable(text: str) -> str:
    """Text that a file can hold."""
    if "\0" in text or (not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)):
        raise PydanticCustomError("unwritable", "this text holds a character that no file can hold")
    return text


def _as_layers(value: Any) -> Any:
    """One number, or numbers in the cell of a CSV file, for a list."""
    if isinstance(value, str):
        return value.strip("[] ").replace(",", " ").split()
    return (value,) if isinstance(value, int) else value


def empty_for_nothing(value: Any) -> Any:
    """A key whose lines below it were all commented out."""
    return {} if value is None else value


Text = Annotated[str, AfterValidator(writable)]
Name = Annotated[str, Field(min_length=1), AfterValidator(writable)]
Number = Annotated[float, BeforeValidator(_no_boolean), Field(allow_inf_nan=False)]
Integer = Annotated[int, BeforeValidator(_no_boolean)]
Layers = Annotated[tuple[Annotated[Integer, Field(ge=0)], ...], BeforeValidator(_as_layers)]
Fraction = Annotated[Number, Field(ge=0, le=1)]
Pixels = Annotated[Integer, Field(ge=8, le=16384)]
Steps = Annotated[Integer, Field(ge=1, le=1000)]
Cells = Annotated[Integer, Field(ge=1)]
Seed = Annotated[Integer, Field(ge=0, lt=2**63)]
