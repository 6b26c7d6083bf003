"""Reading fields of JSON objects, with errors that name the file and the field."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from numbers import Integral
from pathlib import Path
from typing import Any, cast

from ovis_jax.errors import ConfigError
from ovis_jax.user_files import (
    GIT_LFS_POINTER,
    describe_missing_file,
    is_git_lfs_pointer,
    read_text,
)


@dataclass(frozen=True)
class JsonObject:
    """A JSON object, with a name for error messages.

    Attributes:
      values: The fields.
      name: The file and the path of the object in it, such as "config.json: llm_config".
    """

    values: Mapping[str, Any]
    name: str

    def error(self, key: str, found: Any, expected: str) -> ConfigError:
        """Return the error for a field with an unsupported value."""
        return ConfigError(f"{self.name}: {key} is {found!r}, expected {expected}")

    def get(self, key: str) -> Any:
        """Return a required field."""
        if key not in self.values:
            raise ConfigError(f"{self.name}: {key} is missing; the field is required")
        return self.values[key]

    def get_optional(self, key: str, default: Any) -> Any:
        """Return a field, or the default if it is missing."""
        return self.values.get(key, default)

    def require_value(self, key: str, supported: Any) -> None:
        """Check that a field has its only supported value."""
        if (found := self.get(key)) != supported:
            raise self.error(key, found, f"{supported!r}, the only supported value")

    def require_absent(self, key: str, expected: str, *, allowed: tuple[Any, ...] = ()) -> None:
        """Check that a field is missing, null, false or empty, or has an allowed value.

        Args:
          key: The field.
          expected: What is supported instead, for the error message.
          allowed: Other values that the field may have.
        """
        if (found := self.values.get(key)) and found not in allowed:
            raise self.error(key, found, expected)

    def get_object(self, key: str) -> "JsonObject":
        """Return a field that is a nested object."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, value, "an object")
        return JsonObject(cast(Mapping[str, Any], value), f"{self.name}: {key}")

    def get_positive_int(self, key: str) -> int:
        """Return a field that is an integer above 0."""
        if not is_int(value := self.get(key)) or value <= 0:
            raise self.error(key, value, "an integer above 0")
        return value

    def get_positive_number(self, key: str) -> float:
        """Return a field that is an integer or float above 0."""
        value = self.get(key)
        if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
            raise self.error(key, value, "a number above 0")
        return value

    def require_divisor(self, key: str, divisor: int, of_key: str, dividend: int) -> None:
        """Check that the value of one field divides the value of another."""
        if dividend % divisor:
            raise self.error(key, divisor, f"a divisor of {of_key} {dividend}")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object from a file.

    Raises:
      ConfigError: The file is missing or does not contain a JSON object.
    """
    try:
        value = json.loads(read_text(path))
    except FileNotFoundError:
        found = f"is {describe_missing_file(path)}" if path.is_symlink() else "does not exist"
        raise ConfigError(
            f"{path} {found}; a checkpoint folder in the Hub's layout needs {path.name}"
        ) from None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        is_pointer = isinstance(error, json.JSONDecodeError) and is_git_lfs_pointer(path)
        reason = f"it is {GIT_LFS_POINTER}" if is_pointer else error
        raise ConfigError(f"{path} cannot be read as JSON: {reason}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{path} contains a JSON {type(value).__name__}, expected an object")
    return value


def is_int(value: Any) -> bool:
    """Return whether a value is an integer: a Python or numpy integer, but not a bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)


def read_positive_number_fields(
    cls: type, obj: JsonObject, key_names: Mapping[str, str]
) -> dict[str, Any]:
    """Read the int and float fields of a dataclass, all of which must be above 0.

    Args:
      cls: The dataclass.
      obj: The JSON object.
      key_names: Keys in the object, by field name, of the fields whose name and key differ.
    """
    readers = {int: obj.get_positive_int, float: obj.get_positive_number}
    return {
        field.name: readers[field.type](key_names.get(field.name, field.name))
        for field in fields(cls)
        if field.type in readers
    }


def write_positive_number_fields(config: Any, key_names: Mapping[str, str]) -> dict[str, Any]:
    """Return the int and float fields of a dataclass as JSON fields."""
    numbers = [field.name for field in fields(config) if field.type in (int, float)]
    return {key_names.get(name, name): getattr(config, name) for name in numbers}
