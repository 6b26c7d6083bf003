"""JSON objects that name the file and the field in every complaint about what they hold."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from ovis_jax.errors import ConfigError


@dataclass(frozen=True)
class Fields:
    """A JSON object that knows its own dotted name, so that every complaint can give it."""

    values: Mapping[str, Any]
    name: str

    def error(self, key: str, found: Any, expected: str) -> ConfigError:
        """The error to raise when `key` holds `found`."""
        return ConfigError(f"{self.name}: {key} is {found!r}, expected {expected}")

    def get(self, key: str) -> Any:
        """The value of a key that must be there."""
        if key not in self.values:
            raise ConfigError(
                f"{self.name}: {key} is missing; it decides what is computed and is never assumed"
            )
        return self.values[key]

    def optional(self, key: str, default: Any) -> Any:
        """The value of a key that may be left out."""
        return self.values.get(key, default)

    def require(self, key: str, supported: Any) -> None:
        """Refuse any value but the one that is supported."""
        if (found := self.get(key)) != supported:
            raise self.error(key, found, f"{supported!r}: nothing else is supported")

    def section(self, key: str) -> "Fields":
        """An object inside this one."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return Fields(cast(Mapping[str, Any], value), f"{self.name}: {key}")

    def size(self, key: str) -> int:
        """A whole number above 0."""
        if not is_int(value := self.get(key)) or value <= 0:
            raise self.error(key, value, "a whole number above 0")
        return value

    def positive(self, key: str) -> float:
        """A number above 0."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(key, value, "a number above 0")
        return value

    def divides(self, key: str, divisor: int, whole_key: str, whole: int) -> None:
        """Refuse a divisor that leaves a rest."""
        if whole % divisor:
            raise self.error(key, divisor, f"a divisor of {whole_key} {whole}")


def read_json(path: Path) -> dict[str, Any]:
    """Parse a JSON object from a file; `ConfigError` names the file when that fails."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ConfigError(
            f"{path} does not exist: a checkpoint folder in the layout of the Hub needs {path.name}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} holds a JSON {type(value).__name__}, expected an object")
    return value


def is_int(value: Any) -> bool:
    """Whether a value is a whole number, of numpy's too, which true and false are not."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_numbers(cls: type, config: Fields, names: Mapping[str, str]) -> dict[str, Any]:
    """Read the fields of a dataclass that are sizes (int) or other numbers above 0 (float).

    `names` holds our name -> the name in the JSON object, where they differ.
    """
    readers = {int: config.size, float: config.positive}
    return {
        field.name: readers[field.type](names.get(field.name, field.name))
        for field in fields(cls)
        if field.type in readers
    }


def write_numbers(part: Any, names: Mapping[str, str]) -> dict[str, Any]:
    """Write what `read_numbers` reads."""
    numbers = [field.name for field in fields(part) if field.type in (int, float)]
    return {names.get(name, name): getattr(part, name) for name in numbers}
