"""Runs the server until it is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

from uvicorn.config import Config
from uvicorn.server import Server

from lowtide.cli.server.connection import Connection, connection_class
from lowtide.cli.server.guard import App
from lowtide.cli.server.settings import ServerSettings
from lowtide.models.arguments.names import on_command_line, option
from lowtide.models.errors import BadOption

MAX_HEADER_BYTES = 32 << 10
KEEP_CONNECTION_S = 30
LAST_WORDS_S = 2
"""When answers were ended at a stop, their clients have so long to read why."""


def listening_socket(settings: ServerSettings) -> socket.socket:
    """Return a socket that listens; raises `BadOption` where the address cannot be used."""
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM
        )[0]
        listening = socket.socket(family, socket.SOCK_STREAM)
    except OSError as error:
        raise BadOption(
            f"{option('host')} is {settings.host}, which is no address here ({error.strerror}): name another"
        ) from None
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(min(settings.max_connections, 128))
    except OSError as error:
        listening.close()
        raise BadOption(
            f"{option('port')} {settings.port} of {settings.host} cannot be used ({error.strerror}): choose another, "
            "or 0 for a free one"
        ) from None
    return listening


class Serving:
    """A server that answers on a listening socket; `end_answers` ends all answers that run, with an error."""

    def __init__(
        self,
        app: App,
        settings: ServerSettings,
        listening: socket.socket,
        end_answers: Callable[[], None],
    ) -> None:
        self._listening = listening
        self._server = _Server(
            Config(
                app,
                http=connection_class(settings.max_connections),
                loop="asyncio",
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                h11_max_incomplete_event_size=MAX_HEADER_BYTES,
                timeout_keep_alive=KEEP_CONNECTION_S,
                timeout_graceful_shutdown=settings.shutdown_seconds + 2 * LAST_WORDS_S,
            ),
            settings.shutdown_seconds,
            end_answers,
        )

    def run(self) -> None:
        """Answer requests until SIGTERM, SIGINT or `stop`; running answers have a few seconds to end."""
        with _server_spelling(), _handled_signals():
            self._server.run([self._listening])
        self._listening.close()

    def stop(self) -> None:
        """End, as SIGTERM does; any thread may call it."""
        self._server.should_exit = True


class _Server(Server):
    """Ends answers that run too long at a stop, and then connections, before uvicorn cancels their tasks."""

    def __init__(self, config: Config, seconds: float, end_answers: Callable[[], None]) -> None:
        super().__init__(config)
        self._seconds, self._end_answers = seconds, end_answers

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.create_task(self._end_what_runs())
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    async def _end_what_runs(self) -> None:
        await asyncio.sleep(self._seconds)
        self._end_answers()
        await asyncio.sleep(LAST_WORDS_S)
        for connection in list(self.server_state.connections):
            if isinstance(connection, Connection):
                connection.cut()


@contextlib.contextmanager
def _handled_signals() -> Iterator[None]:
    """Do nothing at SIGTERM and SIGINT: uvicorn raises them again when it has ended, which would end the process."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {one: signal.signal(one, _nothing) for one in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)


def _nothing(_number: int, _frame: object) -> None:
    pass


@contextlib.contextmanager
def _server_spelling() -> Iterator[None]:
    """Name options in errors as a client writes them, but those of the server as its owner does."""
    of_owner = {"memory": "--memory", "context": "--context"}
    with on_command_line(of_owner.get):
        yield
