"""From the first replica's start to a graceful end."""

import asyncio
import signal
import socket
from collections.abc import Callable

import uvicorn
from fastapi import FastAPI

from gptfast.errors import UserError
from gptfast.serve.pool import FAILED, READY, Pool, Replica
from gptfast.serve.worker import Failed

# After those who are still answered at the deadline were told so.
_LAST_SECONDS = 5
_LARGEST_PORT = 65_535


class Server(uvicorn.Server):
    """Serves on a socket of one's own until `should_exit` is set, a signal comes, or the model has
    failed; then takes nobody new and lets running answers finish, up to a deadline."""

    def __init__(self, app: FastAPI, pool: Pool, *, shutdown_seconds: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                # Warnings and errors go to stderr; who said what is nobody's business.
                log_config=None,
                access_log=False,
                timeout_graceful_shutdown=int(shutdown_seconds) + _LAST_SECONDS,
            )
        )
        self.pool, self.shutdown_seconds = pool, shutdown_seconds

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self.pool.start()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.pool.stop_asking()
        asyncio.get_running_loop().call_later(self.shutdown_seconds, self.pool.give_up)
        await super().shutdown(sockets)
        await self.pool.close()


def listen(host: str, port: int) -> socket.socket:
    """A socket there; port 0: any that is free. UserError if it cannot be."""
    if not 0 <= port <= _LARGEST_PORT:
        raise UserError(f"port must be 0 to {_LARGEST_PORT}, got {port}")
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host.strip("[]"), port), family=family)
    except OSError as error:
        raise UserError(
            f"cannot listen on {host}, port {port} ({error.strerror}): choose another --port"
        ) from error


def url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def serve(
    app: FastAPI,
    pool: Pool,
    listener: socket.socket,
    *,
    shutdown_seconds: float,
    say: Callable[[str], None],
) -> None:
    """Serve until SIGINT or SIGTERM; a second SIGINT does not wait for anybody. UserError if the
    model cannot be served, RuntimeError if it stopped working."""
    server = Server(app, pool, shutdown_seconds=shutdown_seconds)

    def changed(pool: Pool) -> None:
        if pool.state == READY:
            devices = ", ".join(worker.device for worker in pool.workers)
            say(
                f"ready: {len(pool.ready)} x {pool.slots} answers at a time on {devices}, "
                f"{pool.context:,} tokens each"
            )
        elif pool.state == FAILED:
            server.should_exit = True

    def lost(replica: Replica, failure: Failed) -> None:
        say(f"replica {replica.number} is gone: {failure.message}; {len(pool.ready)} left")

    pool.on_change, pool.on_loss = changed, lost
    # uvicorn raises the signals that ended it once more, for those who were there before.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: None)
    say(f"{url(listener)}: loading the model; Ctrl-C ends the server")
    server.run(sockets=[listener])
    if pool.failure is None:
        return
    if pool.failure.by_user:
        raise UserError(pool.failure.message)
    raise RuntimeError(f"the model has stopped working: {pool.failure.message}")
