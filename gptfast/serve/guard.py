"""What is refused before an endpoint sees it, and where a server may listen at all."""

import hmac
import ipaddress

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from gptfast.errors import UserError
from gptfast.serve.protocol import MAX_BODY_BYTES, ApiError

# Without the token: the page, which asks for it, and whether there is anybody to talk to.
_OPEN_PATHS = ("/", "/health")


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach it."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def check_address(host: str, token: str | None, *, insecure_public: bool) -> None:
    """UserError if everybody who reaches the address could use the server."""
    if not (is_loopback(host) or token or insecure_public):
        raise UserError(
            f"--host {host} can be reached from other machines: set a token (the variable "
            "GPTFAST_TOKEN, or --token), or say --insecure-public if everybody may use this server"
        )


class Guard:
    """Lets through who has the token, what is JSON, and no more of it than there can be.

    local_only: refuses Host headers that name another machine. A page of another site can make a
    browser call a server on this machine by a name of its own (DNS rebinding), and would then be
    of the same origin. It cannot send JSON from its own origin without asking first (CORS).
    """

    def __init__(self, app: ASGIApp, *, token: str | None, local_only: bool) -> None:
        self.app, self.token, self.local_only = app, token, local_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        try:
            self._check(scope["method"], scope["path"], Headers(scope=scope))
        except ApiError as error:
            await error.response()(scope, receive, send)
            return
        await self.app(scope, _limited(receive), send)

    def _check(self, method: str, path: str, headers: Headers) -> None:
        host = headers.get("host", "").rpartition("@")[2]
        if self.local_only and not is_loopback(_without_port(host)):
            raise ApiError(
                403,
                f"this server answers to localhost only, not to {host!r}: give it a --token to "
                "have it reached by other names",
                code="wrong_host",
            )
        if self.token and path not in _OPEN_PATHS and not _has_token(headers, self.token):
            raise ApiError(
                401,
                "this server wants its token: Authorization: Bearer ...",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )
        if method == "POST":
            media_type = headers.get("content-type", "").partition(";")[0].strip().lower()
            if media_type != "application/json":
                raise ApiError(415, "the body must be application/json", code="wrong_media_type")
            if int(headers.get("content-length", "0")) > MAX_BODY_BYTES:
                raise ApiError(413, _TOO_LARGE, code="too_large", headers={"Connection": "close"})


def _has_token(headers: Headers, token: str) -> bool:
    kind, _, given = headers.get("authorization", "").partition(" ")
    # Takes as long for a token that begins right as for any other.
    same = hmac.compare_digest(given.strip().encode("latin-1"), token.encode())
    return kind.lower() == "bearer" and same


def _without_port(host: str) -> str:
    if host.startswith("["):
        return host.partition("]")[0]
    return host.partition(":")[0]


def _limited(receive: Receive) -> Receive:
    """What says no length beforehand is counted."""
    received = 0

    async def counted() -> Message:
        nonlocal received
        message = await receive()
        received += len(message.get("body", b""))
        if received > MAX_BODY_BYTES:
            # Closed, as otherwise the rest would be read, however much that is.
            raise HTTPException(413, _TOO_LARGE, headers={"Connection": "close"})
        return message

    return counted


_TOO_LARGE = f"the body has more than {MAX_BODY_BYTES:,} bytes"
