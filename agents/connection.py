"""How servers of language models are reached: one HTTP client and one event loop, for calls in any thread."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from functools import cache

import httpx2
import openai

LONGEST = 2**24
"""bytes of an answer"""


@cache
def client(own: bool = False) -> httpx2.AsyncClient:
    """The HTTP client of all calls, which takes no answer beyond `LONGEST`, nor one that would unpack to more.

    It goes by the proxies and certificates that the environment names, but for this program's `own` server. Raises
    ImportError, OSError or ValueError where those are none.
    """

    async def bound(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx2.DecodingError("the answer is compressed, though that was not asked for")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream)

    return openai.DefaultAsyncHttpxClient(
        headers={"Accept-Encoding": "identity"}, event_hooks={"response": [bound]}, trust_env=not own
    )


@cache
def idle() -> httpx2.Client:
    """For a chat model's calls that block, which are never made: it would make a client by the environment."""
    return httpx2.Client(trust_env=False)


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > LONGEST:
                raise httpx2.ReadError(f"the answer is longer than {LONGEST / 2**20:g} MiB")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


_STARTING = threading.Lock()


def loop() -> asyncio.AbstractEventLoop:
    """The event loop of all calls, in a thread of its own: only what is asynchronous can be cancelled."""
    with _STARTING:
        return _started_loop()


@cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="language models", daemon=True).start()
    return loop
