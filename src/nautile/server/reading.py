"""Reading a request's fields: each with its kind and range, and an error that names the field and says what it should be."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from nautile.server.errors import ApiError, invalid

__all__ = ["Fields"]


class Fields:
    """An object of a request. A field that is null counts as absent, and unknown fields are never looked at.

    Wrong kinds raise ApiError 400. ``path`` is where the object stands in the request.
    """

    def __init__(self, value: Any, path: str = "") -> None:
        if not isinstance(value, Mapping):
            raise invalid(f"{path or 'the body'} must be an object, got {_kind(value)}", path or None)
        self.value: Mapping[str, Any] = value
        self.path = path

    def at(self, name: str) -> str:
        """The path of a field."""
        return f"{self.path}.{name}" if self.path else name

    def raw(self, name: str) -> Any:
        """A field of any kind, None when absent."""
        return self.value.get(name)

    def has(self, name: str) -> bool:
        """Whether a field is there and says something: not null, not an empty list or object."""
        return self.value.get(name) not in (None, [], {})

    def text(self, name: str) -> str | None:
        """A string."""
        value = self.value.get(name)
        if value is not None and not isinstance(value, str):
            raise self.wrong(name, "a string")
        return value

    def required(self, name: str) -> str:
        """A string that must be there and not empty."""
        value = self.text(name)
        if not value:
            raise invalid(f"{self.at(name)} is missing: give it a string that is not empty", self.at(name))
        return value

    def one_of(self, name: str, allowed: Collection[str]) -> str | None:
        """A string of a fixed set."""
        value = self.text(name)
        if value is not None and value not in allowed:
            raise invalid(f"{self.at(name)} must be one of {', '.join(allowed)}; got {value!r}", self.at(name))
        return value

    def flag(self, name: str, default: bool) -> bool:
        """A boolean."""
        value = self.value.get(name)
        if value is not None and not isinstance(value, bool):
            raise self.wrong(name, "true or false")
        return default if value is None else value

    def object(self, name: str) -> Fields | None:
        """An object."""
        value = self.value.get(name)
        return None if value is None else Fields(value, self.at(name))

    def objects(self, name: str) -> Iterator[Fields]:
        """The objects of a list; none when the field is absent."""
        value = self.value.get(name)
        if value is not None and not isinstance(value, list):
            raise self.wrong(name, "a list")
        return (Fields(item, f"{self.at(name)}[{index}]") for index, item in enumerate(value or ()))

    def wrong(self, name: str, what: str) -> ApiError:
        """The error of a field of the wrong kind."""
        return invalid(f"{self.at(name)} must be {what}, got {_kind(self.value.get(name))}", self.at(name))


def _kind(value: Any) -> str:
    names: dict[type, str] = {str: "a string", bool: "a boolean", int: "a number", float: "a number", list: "a list"}
    return names.get(type(value), "nothing" if value is None else "an object")
