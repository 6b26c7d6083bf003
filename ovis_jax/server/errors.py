"""Errors in the format of OpenAI's API, with their HTTP status."""

from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

ERROR_TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""OpenAI's error type by HTTP status; all other statuses have invalid_request_error."""

UNION_TAGS = {"as_text", "as_parts", "str", "list[str]", "dict[str,any]"}
"""Names in a Pydantic location that are not fields but members of a union."""


class ErrorDetail(BaseModel):
    """An error message, OpenAI's error type, the invalid field, and an error code."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every error response."""

    error: ErrorDetail


class ApiError(HTTPException):
    """An error that is sent to the client as a response.

    Args:
      status: HTTP status.
      message: The error message.
      param: Path of the invalid field, such as messages[0].content.
      code: The error code, which clients can check.
      headers: Additional HTTP headers.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ):
        super().__init__(status, message, headers)
        self.param, self.code = param, code

    def body(self) -> dict[str, Any]:
        """Return the body of the response."""
        error = {
            "message": _printable(self.detail),
            "type": ERROR_TYPES.get(self.status_code, "invalid_request_error"),
            "param": self.param and _printable(self.param),
            "code": self.code,
        }
        return {"error": error}

    def response(self) -> JSONResponse:
        """Return the error as a JSON response."""
        return JSONResponse(self.body(), self.status_code, self.headers)


def bad_request(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """Return an error with status 400 whose message begins with the invalid field."""
    return ApiError(400, f"{param}: {message}", param=param, code=code)


def invalid_json(reason: str) -> ApiError:
    """Return an error with status 400 for a body that is not JSON."""
    return ApiError(400, f"the body is not valid JSON: {reason}", code="invalid_json")


def validation_error(errors: Sequence[Any], content_type: str | None) -> ApiError:
    """Convert Pydantic's errors for a body to one error that names the first invalid field.

    Args:
      errors: The errors.
      content_type: The request's Content-Type. FastAPI parses only bodies of a JSON type.
    """
    first = errors[0]
    if first["type"] == "json_invalid":
        reason = first["ctx"]["error"]
        return invalid_json(f"{reason[:1].lower()}{reason[1:]} at character {first['loc'][1]}")
    param = field_path(first["loc"])
    if param is None:
        if first["type"] == "missing":
            return invalid_json("it is empty")
        if isinstance(first["input"], bytes):
            message = f"the Content-Type is {content_type!r}, expected 'application/json'"
            return ApiError(400, message, code="invalid_content_type")
        return ApiError(400, "the body is not a JSON object", code=first["type"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(400, f"{param}: {message}{more}", param=param, code=first["type"])


def field_path(location: Sequence[str | int]) -> str | None:
    """Convert a Pydantic location to a path such as messages[0].content[1].text."""
    path, after_index = "", False
    for part in location[1:]:  # the first part is always "body"
        if isinstance(part, int):
            # The index of a content part is followed by the tag of its type.
            path, after_index = f"{path}[{part}]", ".content" in path
        elif after_index:
            after_index = False
        elif part not in UNION_TAGS:
            path += f".{part}"
    return path[1:] or None


def _printable(text: str) -> str:
    """Replace unpaired surrogates, which are possible in JSON strings but not in UTF-8."""
    return text.encode("utf-8", "replace").decode()
