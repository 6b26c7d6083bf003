"""How the server says no: the API's own error shape, with the status that belongs to it."""

from collections.abc import Sequence
from typing import Any

from fastapi import HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error"}
"""The API's name for a kind of error, where it is not invalid_request_error."""


BRANCHES = {"as_text", "as_parts", "str", "list[str]"}
"""What stands in a location for the kind of value that a field was taken for."""


class ErrorDetail(BaseModel):
    """What is wrong, which field of the request it is about, and a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    """The body of every answer that is a refusal."""

    error: ErrorDetail


class ApiError(HTTPException):
    """A refusal, raised anywhere below a route."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None
    ):
        super().__init__(status, message)
        self.param, self.code = param, code

    def response(self) -> JSONResponse:
        """The answer to send."""
        return JSONResponse(
            error_body(self.status_code, self.detail, self.param, self.code),
            self.status_code,
            retry_headers(self.status_code, self.code),
        )


def error_body(
    status: int, message: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """A refusal as the API writes it."""
    kind = TYPES.get(status, "invalid_request_error")
    # What users send may hold half of a surrogate pair, which no UTF-8 answer can.
    message, param = _printable(message), param and _printable(param)
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _printable(text: str) -> str:
    return text.encode("utf-8", "replace").decode()


def retry_headers(status: int, code: str | None) -> dict[str, str]:
    """Whether to try again: soon if there was no room; not what took too long once."""
    if status == 429:
        return {"Retry-After": "1"}
    if status == 401:
        return {"WWW-Authenticate": "Bearer"}
    return {"x-should-retry": "false"} if code == "deadline_exceeded" else {}


def invalid(errors: Sequence[Any]) -> ApiError:
    """The refusal of a body that is not as the API describes it; names the first field."""
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(400, "the body is not JSON", code="invalid_json")
    name = field_name(first["loc"])
    message = first["msg"][:1].lower() + first["msg"][1:]
    if first["type"] == "extra_forbidden":
        message = "there is no such field in this API"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(422, f"{name or 'the body'}: {message}{more}", param=name, code=first["type"])


def field_name(location: Sequence[str | int]) -> str | None:
    """A field as a user would write it, such as messages[0].content[1].text."""
    names, branch = "", False
    for part in location[1:]:  # the first says that it is the body
        if isinstance(part, int):
            # Behind an item of a content stands which kind of part it was taken for.
            names, branch = f"{names}[{part}]", ".content" in names
        elif branch:
            branch = False
        elif part not in BRANCHES:
            names += f".{part}"
    return names[1:] or None
