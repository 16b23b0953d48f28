"""The chat model of every server: `ChatOpenAI`, asked through the account of a run, within a wall deadline."""

from __future__ import annotations

import asyncio
import json
import math
import threading
import time
from collections.abc import AsyncIterator, Coroutine
from functools import cache
from typing import Any, Literal

import httpx2
import openai
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage, message_chunk_to_message
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_before_delay
from tenacity.nap import sleep_using_event
from tenacity.wait import wait_exponential_jitter

from agents.account import CallFailed, Conversation
from agents.answer import REASONING, Answer
from tap_eval.mistake import Mistake

TRIES = 3
_LONGEST = 2**24
"""bytes of an answer"""
_AGAIN = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError)
_PAUSE = wait_exponential_jitter(initial=1, max=20)


class ModelMistake(Mistake):
    """A language model that cannot be reached, that lacks its key, or that failed."""

    kind = "model"


class MeteredChat(ChatOpenAI):
    """A chat model of any OpenAI-compatible server, asked through the account of a run.

    The timeouts of HTTP clients are those of one read, which an answer that dribbles in never
    passes; here a call is cancelled when `seconds` have passed over all its tries. A try is a
    row of the account, so the client itself tries once. Where it `streams`, the callbacks of
    the caller are given the words while they come, and there is one try.
    """

    conversation: Conversation
    seconds: float
    address: str
    """tells this server from others in the cache of answers"""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_completion_tokens"
    """what the server calls the most tokens of an answer"""
    forced: bool = True
    """whether the server takes an order to call some tool; models that think may refuse it"""
    streams: bool = False
    disable_streaming: Literal[True] = True  # LangChain's own streams would pass the account by
    max_retries: int = 0
    stream_chunk_timeout: float | None = None  # its `wait_for` around each chunk can swallow the cancellation of a call

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        request = self._get_request_payload(messages, stop=stop, **options)
        # no tokenizer makes more tokens of a text than it has bytes; the seed counts where it is not sent too
        size = len(json.dumps(request))
        call = self.conversation.call([self.address, self.seed, request], size, self.max_tokens or 0)
        ends = 0.0

        def send() -> Answer:
            nonlocal ends
            ends = ends or time.monotonic() + self.seconds
            return self._send(self._asked(messages, stop, run_manager, options), ends - time.monotonic())

        tries = Retrying(
            stop=stop_after_attempt(1 if self.streams else TRIES) | stop_before_delay(self.seconds),
            wait=_pause,
            sleep=sleep_using_event(self.conversation.account.stopping),
            retry=retry_if_exception(lambda error: isinstance(error, CallFailed) and error.again),
            reraise=True,
        )
        message = tries(self.conversation.account.ask, call, send).message()
        message.id = _identity(run_manager)
        return ChatResult(generations=[ChatGeneration(message=message)])

    async def _asked(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: CallbackManagerForLLMRun | None,
        options: dict[str, Any],
    ) -> BaseMessage:
        if not self.streams:
            result = await super()._agenerate(messages, stop, **options)
            return result.generations[0].message
        chunks: list[ChatGenerationChunk] = []
        async for chunk in super()._astream(messages, stop, stream_usage=True, **options):
            chunk.message.id = _identity(run_manager)
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            chunks.append(chunk)
            await asyncio.sleep(0)  # else what comes without a pause could not be cancelled
        whole = chunks[0] + chunks[1:] if chunks else None
        facts = {**(whole.generation_info or {}), **whole.message.response_metadata} if whole else {}
        if whole is None or not (facts.get("finish_reason") or facts.get("status")):
            raise ConnectionError("the answer was cut off")
        return message_chunk_to_message(whole.message)

    def _send(self, asked: Coroutine[Any, Any, BaseMessage], seconds: float) -> Answer:
        """One try; raises `CallFailed`, whose words hold no key."""
        try:
            message = asyncio.run_coroutine_threadsafe(asyncio.wait_for(asked, seconds), _loop()).result()
            assert isinstance(message, AIMessage)
            return self._answer(message)
        except TimeoutError as error:
            raise CallFailed(f"{self.conversation.llm}: no whole answer within {self.seconds:g} s") from error
        except Exception as error:
            refused = isinstance(error, openai.APIStatusError)
            raise CallFailed(
                self._words(error), free=refused, again=isinstance(error, _AGAIN), pause=_wanted_pause(error)
            ) from error

    def _words(self, error: Exception) -> str:
        """The error in a sentence without the key, which servers like to repeat."""
        key = getattr(self.openai_api_key, "get_secret_value", str)()
        text = f"{self.conversation.llm}: {reason(error)}"
        return (text.replace(key, "***") if len(key) > 4 else text)[:250]

    def _answer(self, message: AIMessage) -> Answer:
        return Answer.of(message)

    def _get_request_payload(
        self, input_: LanguageModelInput, *, stop: list[str] | None = None, **options: Any
    ) -> dict[str, Any]:
        payload = super()._get_request_payload(input_, stop=stop, **options)
        if "max_completion_tokens" in payload:
            payload[self.limit] = payload.pop("max_completion_tokens")
        if "input" in payload:  # for the Responses API, which some models want, and which knows no seed
            payload.pop("seed", None)
        if payload.get("tool_choice") == "required" and not self.forced:
            payload["tool_choice"] = "auto"
        for message, sent in zip(self._convert_input(input_).to_messages(), payload.get("messages", ()), strict=False):
            if reasoning := message.additional_kwargs.get(REASONING):
                sent[REASONING] = reasoning
        return payload

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        choices = getattr(response, "choices", None) or ()
        for choice in choices:
            for call in choice.message.tool_calls or ():
                if call.type == "function" and not call.function.arguments.lstrip().startswith("{"):
                    call.function.arguments = f"no object: {call.function.arguments}"  # as LangChain takes no JSON
        result = super()._create_chat_result(response, generation_info)
        for choice, generation in zip(choices, result.generations, strict=False):
            if reasoning := (choice.message.model_extra or {}).get(REASONING):
                generation.message.additional_kwargs[REASONING] = reasoning
        return result

    def _convert_chunk_to_generation_chunk(self, chunk: dict[str, Any], *options: Any) -> ChatGenerationChunk | None:
        generation = super()._convert_chunk_to_generation_chunk(chunk, *options)
        for choice in chunk.get("choices") or ():
            if generation and (reasoning := (choice.get("delta") or {}).get(REASONING)):
                generation.message.additional_kwargs[REASONING] = reasoning
        return generation


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    text = str(error) if isinstance(error, CallFailed) else f"{type(error).__name__}: {error}"
    if isinstance(error, openai.APIConnectionError):
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        text += f" ({cause})"
    return " ".join(text.split())


def _identity(run_manager: CallbackManagerForLLMRun | None) -> str | None:
    """Of a message and of the pieces that it came in, which makes them one."""
    return f"lc_run--{run_manager.run_id}" if run_manager else None


def _pause(state: RetryCallState) -> float:
    """Seconds before the next try: what the server wants, or ever longer."""
    failed = state.outcome and state.outcome.exception()
    wanted = failed.pause if isinstance(failed, CallFailed) else None
    return _PAUSE(state) if wanted is None else wanted


def _wanted_pause(error: Exception) -> float | None:
    try:
        wanted = float(error.response.headers["retry-after"]) if isinstance(error, openai.APIStatusError) else -1.0
    except (KeyError, ValueError):  # none, or a date
        return None
    return wanted if 0 <= wanted < math.inf else None


@cache
def client() -> httpx2.AsyncClient:
    """The HTTP client of all calls, which takes no answer beyond `_LONGEST`, nor one that would unpack to more."""

    async def bound(response: httpx2.Response) -> None:
        if response.headers.get("content-encoding", "identity") != "identity":
            raise httpx2.DecodingError("the answer is compressed, though that was not asked for")
        assert isinstance(response.stream, httpx2.AsyncByteStream)
        response.stream = _Bounded(response.stream)

    return openai.DefaultAsyncHttpxClient(headers={"Accept-Encoding": "identity"}, event_hooks={"response": [bound]})


class _Bounded(httpx2.AsyncByteStream):
    def __init__(self, stream: httpx2.AsyncByteStream) -> None:
        self._stream = stream

    async def __aiter__(self) -> AsyncIterator[bytes]:
        size = 0
        async for part in self._stream:
            size += len(part)
            if size > _LONGEST:
                raise httpx2.ReadError(f"the answer is longer than {_LONGEST / 2**20:g} MiB")
            yield part

    async def aclose(self) -> None:
        await self._stream.aclose()


_STARTING = threading.Lock()


def _loop() -> asyncio.AbstractEventLoop:
    """The event loop of all calls, in a thread of its own: only what is asynchronous can be cancelled."""
    with _STARTING:
        return _started_loop()


@cache
def _started_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="language models", daemon=True).start()
    return loop
