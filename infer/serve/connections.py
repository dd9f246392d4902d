"""Connections to clients that do not read."""

import asyncio
from typing import Any

from uvicorn.protocols.http.auto import AutoHTTPProtocol


def dropping(patience: float) -> Any:
    """uvicorn's protocol, which drops a client that takes nothing of its answer for so many seconds."""
    base: Any = AutoHTTPProtocol

    class Dropping(base):
        _timer: asyncio.TimerHandle | None = None

        def pause_writing(self) -> None:  # the answer waits until the client takes some of what it has been sent
            super().pause_writing()
            self._timer = asyncio.get_running_loop().call_later(patience, self.transport.abort)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._forget()

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            self._forget()

        def _forget(self) -> None:
            if self._timer is not None:
                self._timer.cancel()
                self._timer = None

    return Dropping
