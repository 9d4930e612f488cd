"""Errors as OpenAI's API tells them: {"error": {"message", "type", "param", "code"}} with a status."""

from typing import Any

TYPES = {429: "rate_limit_error", 500: "server_error", 503: "server_error", 504: "timeout_error"}


class ApiError(Exception):
    """What a client is told. `param`: the field that is at fault; `code`: a word that programs can rely on."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code

    def body(self) -> dict[str, Any]:
        kind = TYPES.get(self.status, "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def invalid(param: str, message: str, code: str = "invalid_value") -> ApiError:
    """A field with a value that is not allowed."""
    return ApiError(400, f"{param}: {message}" if param else message, param=param or None, code=code)


def shutting_down() -> ApiError:
    return ApiError(503, "the server is shutting down", code="shutting_down")


def internal() -> ApiError:
    """Something went wrong here; what it was is in the server's log only."""
    return ApiError(500, "the server failed on this request; its log says why", code="internal_error")


def out_of_time() -> ApiError:
    return ApiError(504, "the request took longer than the server's --timeout", code="timeout")
