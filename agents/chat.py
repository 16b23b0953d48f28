"""The chat model of every server: `ChatOpenAI`, asked through the account of a run, within a wall deadline."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Collection, Coroutine, Mapping
from concurrent.futures import wait
from typing import Any, Literal

import openai
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import LanguageModelInput
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatGenerationChunk, ChatResult
from langchain_openai import ChatOpenAI
from pydantic import Field
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_attempt, stop_before_delay
from tenacity.nap import sleep_using_event
from tenacity.wait import wait_exponential_jitter

from agents.account import CallFailed, Conversation, Interrupted
from agents.answer import REASONING, Answer
from agents.connection import idle, loop
from agents.parameters import Parameter, Refused, accepted, named, without
from agents.reading import NOTES, REFUSAL, Garbled, read, regular, spoken
from tap_eval.mistake import Mistake
from tools.keys import redacted

TRIES = 3
_NOTHING = "(no answer)"
"""in place of an answer of the model that is empty, which servers refuse to read"""
_REFUSALS = (400, 422)
"""HTTP status of a request that the server will not take as it is"""
_AGAIN = (openai.APIConnectionError, openai.RateLimitError, openai.InternalServerError, Garbled)
_PAUSE = wait_exponential_jitter(initial=1, max=20)


class ModelMistake(Mistake):
    """A language model that cannot be reached, that lacks its key, or that failed."""

    kind = "model"


class MeteredChat(ChatOpenAI):
    """A chat model of any OpenAI-compatible server, asked through the account of a run.

    The timeouts of HTTP clients are those of one read, which an answer that dribbles in never
    passes; here a call is cancelled when `seconds` have passed over all its tries. A try is a
    row of the account, so the client itself tries once. Where it `streams`, the callbacks of
    the caller are given the words while they come, and there is one try. A parameter that the
    server refuses is left out from then on, at once and in every call that shares `refused`.
    """

    conversation: Conversation
    seconds: float
    address: str
    """tells this server from others in the cache of answers"""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_completion_tokens"
    """what the server calls the most tokens of an answer"""
    forced: bool = True
    """whether the server takes an order to call some tool; models that think may refuse it"""
    left_out: frozenset[Parameter] = frozenset()
    """what no request is to have"""
    refused: Refused = Field(default_factory=Refused)
    streams: bool = False
    disable_streaming: Literal[True] = True  # LangChain's own streams would pass the account by
    max_retries: int = 0
    openai_proxy: str | None = None  # of a variable that no other program knows
    http_client: Any = Field(default_factory=idle, exclude=True)
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
        tools = [tool["function"]["name"] for tool in options.get("tools", ()) if "function" in tool]
        ends = 0.0
        known: Mapping[str, str | None] = {}

        def send() -> Answer:
            nonlocal ends, known
            ends = ends or time.monotonic() + self.seconds
            known = self.refused.known()
            asked = self._asked(messages, stop, run_manager, {**options, "refused": known})
            return self._send(asked, ends - time.monotonic(), tools)

        tries = Retrying(
            stop=stop_after_attempt(1 if self.streams else TRIES) | stop_before_delay(self.seconds),
            wait=_pause,
            sleep=sleep_using_event(self.conversation.account.stopping),
            retry=retry_if_exception(lambda error: isinstance(error, CallFailed) and error.again),
            reraise=True,
        )
        notes: list[str] = []
        while True:
            try:
                message = tries(self.conversation.account.ask, call, send).message()
                break
            except CallFailed as failed:
                sent = accepted({"stream_options": None, **request} if self.streams else request, known)
                found = named(sent, failed.refusal)
                if found is None:
                    raise
                notes += [self._note(*found)] if self.refused.learn(*found) else []
        message.id = _identity(run_manager)
        message.response_metadata |= {NOTES: notes} if notes else {}
        return ChatResult(generations=[ChatGeneration(message=message)])

    def _note(self, name: str, instead: str | None) -> str:
        """What the user is told of a parameter that is refused."""
        if instead:
            return f"{self.conversation.llm} refuses {name} and is sent {instead} in its place."
        unbounded = "; its answers may be longer, and cost more, than answer_tokens says" if "max" in name else ""
        return f"{self.conversation.llm} refuses {name}, which is left out from now on{unbounded}."

    async def _asked(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None,
        run_manager: CallbackManagerForLLMRun | None,
        options: dict[str, Any],
    ) -> BaseMessage:
        if not self.streams:
            try:
                result = await super()._agenerate(messages, stop, **options)
                return result.generations[0].message
            except openai.OpenAIError:
                raise
            except Exception as error:
                raise Garbled(f"the server's answer is garbled: {error}") from error
        chunks: list[ChatGenerationChunk] = []
        head: str | None = ""
        async for chunk in super()._astream(messages, stop, stream_usage=True, **options):
            chunk.message.id = _identity(run_manager)
            chunks.append(chunk)
            if head is not None:  # thinking is not shown
                head += chunk.text
                shown = spoken(head)
                head = head if shown is None else None
                chunk = ChatGenerationChunk(message=chunk.message.model_copy(update={"content": shown or ""}))
            if run_manager:
                run_manager.on_llm_new_token(chunk.text, chunk=chunk)
            await asyncio.sleep(0)  # else what comes without a pause could not be cancelled
        whole = chunks[0] + chunks[1:] if chunks else None
        facts = {**(whole.generation_info or {}), **whole.message.response_metadata} if whole else {}
        if whole is None or not (facts.get("finish_reason") or facts.get("status")):
            raise ConnectionError("the answer was cut off")
        whole.message.response_metadata = facts
        return whole.message

    def _send(self, asked: Coroutine[Any, Any, BaseMessage], seconds: float, tools: Collection[str]) -> Answer:
        """One try of a model that may call `tools`; raises `CallFailed`, whose words hold no key.

        An interrupt waits for an answer that nobody reads on the way, and is `Interrupted` with it.
        """

        async def answered() -> Answer:
            return self._answer(await asyncio.wait_for(asked, seconds), tools)

        under_way = asyncio.run_coroutine_threadsafe(answered(), loop())
        try:
            return under_way.result()
        except KeyboardInterrupt:
            if self.streams or wait([under_way]).not_done or under_way.exception():
                raise
            raise Interrupted(under_way.result()) from None
        except TimeoutError as error:
            raise CallFailed(f"{self.conversation.llm}: no whole answer within {self.seconds:g} s") from error
        except Exception as error:
            raise CallFailed(
                self._words(error),
                free=isinstance(error, openai.APIStatusError),
                again=isinstance(error, _AGAIN),
                pause=_wanted_pause(error),
                refusal=_refusal(error),
            ) from error

    @property
    def _secret(self) -> str:
        return getattr(self.openai_api_key, "get_secret_value", str)()

    def _words(self, error: Exception) -> str:
        """The error in a sentence without the key, which servers like to repeat."""
        return str(redacted(f"{self.conversation.llm}: {reason(error)}", self._secret))[:250]

    def _answer(self, message: BaseMessage, tools: Collection[str]) -> Answer:
        """The record of what was said, without the key: from here on it is kept, in logs, caches and replays."""
        assert isinstance(message, AIMessage)
        said = read(message, tools).model_dump(mode="json")
        return Answer.model_validate(redacted(said, self._secret))

    def _get_request_payload(
        self,
        input_: LanguageModelInput,
        *,
        stop: list[str] | None = None,
        refused: Mapping[str, str | None] | None = None,
        **options: Any,
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
            if sent["role"] == "assistant" and not (sent.get("content") or sent.get("tool_calls")):
                sent["content"] = _NOTHING
        return accepted(without(payload, self.left_out), refused or {})

    def _create_chat_result(self, response: Any, generation_info: dict[str, Any] | None = None) -> ChatResult:
        if not isinstance(response, openai.BaseModel):
            return super()._create_chat_result(response, generation_info)
        whole = response.model_dump(warnings=False)
        choices = [{**choice, "message": regular(choice["message"])} for choice in whole.get("choices") or ()]
        result = super()._create_chat_result({**whole, "choices": choices}, generation_info)
        for choice, generation in zip(choices, result.generations, strict=True):
            _keep(choice["message"], generation.message)
            generation.message.response_metadata["finish_reason"] = choice.get("finish_reason")
        return result

    def _convert_chunk_to_generation_chunk(self, chunk: dict[str, Any], *options: Any) -> ChatGenerationChunk | None:
        choices = chunk.get("choices") or ()
        pieces = [{**choice, "delta": regular(choice.get("delta") or {}, whole=False)} for choice in choices]
        generation = super()._convert_chunk_to_generation_chunk({**chunk, "choices": pieces}, *options)
        if generation:
            for piece in pieces:
                _keep(piece["delta"], generation.message)
        return generation


def _keep(given: Mapping[str, Any], message: BaseMessage) -> None:
    """What LangChain does not take from a message of a server, or from a piece of one."""
    message.additional_kwargs |= {name: given[name] for name in (REASONING, REFUSAL) if given.get(name)}


def reason(error: Exception) -> str:
    """What went wrong, in a line."""
    text = str(error) if isinstance(error, (CallFailed, Garbled)) else f"{type(error).__name__}: {error}"
    if isinstance(error, openai.APIStatusError) and text.endswith(str(error.status_code)):  # its words are elsewhere
        text += f" - {error.response.text}"
    if isinstance(error, openai.APIConnectionError):
        cause: BaseException = error
        while cause.__cause__:
            cause = cause.__cause__
        text += f" ({cause})"
    return " ".join(text.split())


def _refusal(error: Exception) -> str:
    """All that a server says of a request that it does not take as it is."""
    if not isinstance(error, openai.APIStatusError) or error.status_code not in _REFUSALS:
        return ""
    return f"{error.param or ''} {error.response.text}"


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
