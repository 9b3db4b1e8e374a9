"""What clients send, what of it is too much, and the errors they get: OpenAI's shapes.

An error is {"error": {"message", "type", "param", "code"}}. 400: cannot be understood or answered;
413: too large; 422: a field is missing, of a wrong type or out of range.
"""

import math
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from gptfast.conversation import PYTHON, PYTHON_OUTPUT, TEXT

# The reference's limits.
MAX_MESSAGES = 500
MAX_MESSAGE_CHARACTERS = 8_000
MAX_CHARACTERS = 32_000
MAX_TOKENS = 4096
# Of the body: all characters as escaped surrogate pairs (12 bytes each), and room for the rest.
MAX_BODY_BYTES = 12 * MAX_CHARACTERS + 1024 * MAX_MESSAGES


class ApiError(Exception):
    """A request that is not answered, and what the client is told."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.headers = status, message, dict(headers or {})
        self.body = {
            "error": {"message": message, "type": _type(status), "param": param, "code": code}
        }

    def response(self) -> JSONResponse:
        return JSONResponse(self.body, self.status, self.headers)


def _type(status: int) -> str:
    names = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
    return names.get(status, "server_error" if status >= 500 else "invalid_request_error")


def unavailable(message: str, *, code: str, retry_after: float = 1.0) -> ApiError:
    return ApiError(503, message, code=code, headers=_retry_after(retry_after))


def queue_is_full(waiting: int, retry_after: float) -> ApiError:
    return ApiError(
        429,
        f"all slots are taken and {waiting} requests wait for one already: try again later",
        code="queue_full",
        headers=_retry_after(retry_after),
    )


def _retry_after(seconds: float) -> dict[str, str]:
    return {"Retry-After": str(max(1, math.ceil(seconds)))}


class Part(BaseModel):
    # pyrefly: ignore[not-a-type]  (constants of gptfast.conversation, which pydantic looks up)
    type: Literal[TEXT, PYTHON, PYTHON_OUTPUT]
    text: str


class Message(BaseModel):
    role: Literal["system", "user", "assistant"]
    content: str | list[Part]

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)

    def plain(self) -> dict[str, Any]:
        """As gptfast.conversation takes it: parts are the assistant's alone."""
        if isinstance(self.content, str) or self.role != "assistant":
            return {"role": self.role, "content": self.text}
        return self.model_dump()


class StreamOptions(BaseModel):
    include_usage: bool = False


class ChatRequest(BaseModel):
    """The body of both endpoints: OpenAI's, and top_k. What is null is the server's default.

    Fields that are not here are ignored, but for those that would change the answer's meaning.
    """

    model_config = ConfigDict(extra="allow")

    messages: Annotated[list[Message], Field(min_length=1)]
    temperature: Annotated[float | None, Field(ge=0, le=2)] = None
    top_k: Annotated[int | None, Field(ge=1, le=200)] = None
    top_p: Annotated[float | None, Field(gt=0, le=1)] = None
    max_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1, le=MAX_TOKENS)] = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None

    @property
    def stop_strings(self) -> list[str]:
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """ApiError for what has the right types, and yet is too much or cannot be done."""
        if len(self.messages) > MAX_MESSAGES:
            raise _too_large("messages", f"{len(self.messages)} messages; {MAX_MESSAGES} at most")
        lengths = [len(message.text) for message in self.messages]
        for number, length in enumerate(lengths):
            name = f"messages[{number}]"
            if not length:
                raise ApiError(400, f"{name} is empty", code="empty_message", param=name)
            if length > MAX_MESSAGE_CHARACTERS:
                raise _too_large(
                    name, f"{name} has {length:,} characters; {MAX_MESSAGE_CHARACTERS:,} at most"
                )
        if sum(lengths) > MAX_CHARACTERS:
            message = f"{sum(lengths):,} characters in all messages; {MAX_CHARACTERS:,} at most"
            raise _too_large("messages", message)
        strings = self.stop_strings
        if len(strings) > 4 or not all(0 < len(string) <= 100 for string in strings):
            raise _not_supported("stop", "more than 4 strings, or not of 1 to 100 characters each")
        for name, neutral in _ONLY_NEUTRAL.items():
            value = (self.model_extra or {}).get(name)
            if value not in neutral:
                raise _not_supported(name, repr(value))


# Fields of OpenAI's that change what an answer is, told from ignored; and their values that do not,
# as clients send defaults too (0.0 is 0).
_ONLY_NEUTRAL: dict[str, tuple] = {
    "n": (None, 1),
    "logprobs": (None, False),
    "tools": (None, []),
    "tool_choice": (None, "none", "auto"),
    "functions": (None, []),
    "function_call": (None, "none", "auto"),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, [], ["text"]),
    "audio": (None,),
    "response_format": (None, {"type": "text"}),
}


def _too_large(param: str, message: str) -> ApiError:
    return ApiError(413, message, code="too_large", param=param)


def _not_supported(param: str, value: str) -> ApiError:
    return ApiError(
        400, f"{param}: {value} is not supported here", code="unsupported_value", param=param
    )
