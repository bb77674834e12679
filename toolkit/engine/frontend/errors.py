"""ApiError: an answer to the client that is not a completion, in OpenAI's error format.

Knows nothing of HTTP routes; ``server.py`` turns it into a response, ``generate.py`` into an event of a stream.
"""

from __future__ import annotations

from typing import Any

import msgspec


class ErrorFields(msgspec.Struct):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(msgspec.Struct):
    """What a client gets that gets no answer."""

    error: ErrorFields


class ApiError(Exception):
    """An error for the client.

    Args:
        status: HTTP status.
        message: names field, value, rule and way out.
        param: the request field at fault, where there is one.
        code: OpenAI's machine-readable code, where there is one.
        retry_after_s: sent as ``Retry-After``; 0: not sent.
    """

    def __init__(
        self, status: int, message: str, *, param: str | None = None, code: str | None = None, retry_after_s: int = 0
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.retry_after_s = retry_after_s

    @property
    def type(self) -> str:
        if self.status == 401:
            return "authentication_error"
        return "invalid_request_error" if self.status < 500 else "server_error"

    @property
    def headers(self) -> dict[str, str]:
        return {"Retry-After": str(self.retry_after_s)} if self.retry_after_s else {}

    def body(self) -> bytes:
        return msgspec.json.encode(ErrorBody(ErrorFields(self.message, self.type, self.param, self.code)))


def shown(value: Any, limit: int = 80) -> str:
    """A value as the client wrote it, in JSON, cut to ``limit`` characters."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= limit else text[: limit - 3] + "..."
