"""Which language model is meant: a provider's, one of any OpenAI-compatible server, the embedded one, or several.

Keys come from the environment and go nowhere but into requests.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, Protocol
from urllib.parse import urlsplit
from urllib.request import proxy_bypass

import httpx2
from langchain_core.language_models import BaseChatModel
from pydantic import SecretStr

from agents.account import Conversation, Price
from agents.chat import MeteredChat, ModelMistake
from agents.connection import client
from agents.embedded import EMBEDDED, embedded_chat, start
from agents.parameters import Parameter, Refused
from agents.replay import Replay

REPLAY = "replay:"


@dataclass(frozen=True)
class Provider:
    """Where models are served, and what is particular about asking there."""

    url: str
    key: str
    """environment variable of the key"""
    local: bool = False
    """whether it needs no key and costs nothing"""
    limit: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    forced: bool = True
    """see `agents.chat.MeteredChat`"""


PROVIDERS = {
    "openai": Provider("https://api.openai.com/v1", "OPENAI_API_KEY", limit="max_completion_tokens"),
    "deepseek": Provider("https://api.deepseek.com", "DEEPSEEK_API_KEY", forced=False),
    "qwen": Provider("https://dashscope-intl.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY", forced=False),
    "xai": Provider("https://api.x.ai/v1", "XAI_API_KEY", limit="max_completion_tokens"),
    "ollama": Provider("http://localhost:11434/v1", "OLLAMA_API_KEY", local=True),
    "vllm": Provider("http://localhost:8000/v1", "VLLM_API_KEY", local=True),
    "llamacpp": Provider("http://localhost:8080/v1", "LLAMA_API_KEY", local=True),
}
_LISTING_SECONDS = 10.0
_LONGEST_LIST = 2**22
OTHER = Provider("", "OPENAI_API_KEY")
"""A server that the user gives the address of."""


class Model(Protocol):
    """A language model for one proposal."""

    @property
    def spec(self) -> str:
        """What the user calls it."""

    @property
    def small(self) -> bool:
        """Whether it decodes under a grammar and is given the short prompts."""

    @property
    def reflects(self) -> bool:
        """Whether it can say what is to be learned from a generation."""

    def chat(self, conversation: Conversation, seed: int, grammar: str | None) -> BaseChatModel:
        """A chat model that samples with `seed`, under `grammar` where the model is small."""


class Models(Protocol):
    """What `--llm` names: one language model or several."""

    @property
    def members(self) -> Sequence[LanguageModel]:
        """All that may be asked."""

    def draw(self, name: str, seed: int) -> Model:
        """The model for the candidate `name`, whose proposal has `seed`; always the same."""

    def check(self) -> None:
        """Raises `ModelMistake` unless every model can be asked; starts the embedded one, costs no tokens."""


@dataclass(frozen=True)
class LanguageModel:
    """One language model; without a `name`, the first that the server at `base_url` lists."""

    name: str
    base_url: str | None = None
    temperature: float = 1.0
    provider: Provider = PROVIDERS["openai"]
    spec: str = ""
    """what the user calls it; the name unless given"""
    seconds: float = 180.0
    """wall time of a call"""
    tokens: int = 8192
    """the most that an answer may have; a server that is free decides for itself"""
    leave_out: tuple[Parameter, ...] = ()
    """what no request is to have"""
    refused: Refused = field(default_factory=Refused, compare=False, repr=False)
    """what its server would not take so far"""

    def __post_init__(self) -> None:
        object.__setattr__(self, "spec", self.spec or self.name)

    @property
    def small(self) -> bool:
        """Whether it decodes under a grammar and is given the short prompts."""
        return self.name == EMBEDDED

    @property
    def reflects(self) -> bool:
        """Whether it can say what is to be learned from a generation: a small one cannot."""
        return not self.small

    @property
    def free(self) -> bool:
        """Whether it is known to cost nothing."""
        return self.small or (self.provider.local and self.base_url is None)

    @property
    def members(self) -> Sequence[LanguageModel]:
        """Itself."""
        return (self,)

    def draw(self, name: str, seed: int) -> LanguageModel:
        """Itself."""
        return self

    def chat(
        self, conversation: Conversation, seed: int, grammar: str | None, *, streams: bool = False
    ) -> BaseChatModel:
        """A chat model that samples with `seed`, under `grammar` where the model is small.

        Where it `streams`, callbacks are given the words while they come.
        """
        asking: dict[str, Any] = {
            "temperature": self.temperature,
            "seed": seed % 2**31,
            "conversation": conversation,
            "seconds": self.seconds,
            "timeout": None,
        }
        if self.small:
            return embedded_chat(grammar or "", **asking)
        return MeteredChat(
            model=self._served,
            base_url=self._url,
            address=self._url,
            api_key=SecretStr(self._key() or "none"),
            max_completion_tokens=None if self.free else self.tokens,
            limit=self.provider.limit,
            forced=self.provider.forced,
            left_out=frozenset(self.leave_out),
            refused=self.refused,
            streams=streams,
            http_async_client=client(),
            **asking,
        )

    def check(self) -> None:
        """Raises `ModelMistake` unless the model can be asked; starts the embedded one, costs no tokens."""
        if self.small:
            start()
            return
        if self._key() is None and self.base_url is None and not self.provider.local:
            raise ModelMistake(
                f"{self.spec} needs a key: set {self.provider.key}, or give the --base-url of a local server, "
                f"or take --llm {EMBEDDED}."
            )
        self._listed()
        self._served  # noqa: B018

    @property
    def _url(self) -> str:
        return (self.base_url or self.provider.url).rstrip("/")

    @cached_property
    def _served(self) -> str:
        """The name at the server."""
        if self.name:
            return self.name
        try:
            return str(json.loads(self._listed())["data"][0]["id"])
        except (ValueError, LookupError, TypeError) as error:
            raise ModelMistake(f"{self._url} lists no model: name one, as --llm MODEL@{self._url}.") from error

    def _listed(self) -> bytes:
        """What the server answers when it is asked for its models."""
        headers = {"Authorization": f"Bearer {self._key() or 'none'}", "Accept-Encoding": "identity"}
        ends, body = time.monotonic() + _LISTING_SECONDS, bytearray()
        try:
            client()
            with httpx2.stream("GET", f"{self._url}/models", headers=headers, timeout=_LISTING_SECONDS) as answer:
                for part in answer.iter_raw():
                    body += part
                    if len(body) > _LONGEST_LIST or time.monotonic() > ends:
                        raise httpx2.ReadError("its list of models has no end")
        except (httpx2.HTTPError, httpx2.InvalidURL, ImportError, OSError, ValueError) as error:
            ways = _ways(self._url, error)
            by_ways = f"see to {', '.join(ways)} of the environment, " if ways else ""
            raise ModelMistake(
                f"{self._url} does not answer ({error}): {by_ways}start the server, or give another --base-url, "
                f"or take --llm {EMBEDDED}."
            ) from error
        if answer.status_code in (401, 403):
            raise ModelMistake(
                f"{self._url} refuses the key in {self.provider.key} ({answer.status_code}): set a valid one."
            )
        return bytes(body)

    def _key(self) -> str | None:
        key = os.environ.get(self.provider.key, "").strip()
        if not (key.isascii() and key.isprintable()):
            raise ModelMistake(f"{self.provider.key} holds characters that no key has: set it anew.")
        return key or None


def _ways(url: str, error: Exception) -> list[str]:
    """Variables of the environment by which a connection goes: of proxies, and of certificates where these failed."""
    parts = urlsplit(url)
    ways = set() if proxy_bypass(parts.netloc) else {f"{parts.scheme}_PROXY".upper(), "ALL_PROXY"}
    if isinstance(error, OSError) or "CERTIFICATE" in str(error).upper():
        ways |= {"SSL_CERT_FILE", "SSL_CERT_DIR"}
    return [name for name in os.environ if name.upper() in ways]


@dataclass(frozen=True)
class Mixture:
    """Several language models, each drawn for a share of the proposals."""

    members: Sequence[LanguageModel]
    weights: Sequence[float]

    def draw(self, name: str, seed: int) -> LanguageModel:
        """The one that `seed` falls on."""
        return random.Random(f"language model/{seed}").choices(self.members, self.weights)[0]

    def check(self) -> None:
        """Raises `ModelMistake` unless every model can be asked."""
        for member in self.members:
            member.check()


def parse(llm: str, base_url: str | None = None, **asking: Any) -> Models:
    """The models that `llm` names; `asking` are fields of every `LanguageModel`. Raises `ModelMistake`.

    `embedded`, `PROVIDER:MODEL`, `MODEL@URL`, `PROVIDER:MODEL@URL`, `URL`, or `MODEL` at `base_url`
    (OpenAI's without one); several with commas between, each with `=WEIGHT` where that is not 1;
    or `replay:FILE` alone.
    """
    if llm.startswith(REPLAY):
        return Replay(Path(llm.removeprefix(REPLAY)))
    parts = [part.strip() for part in llm.split(",") if part.strip()]
    if not parts:
        raise ModelMistake(f"--llm '{llm}' names no language model: give one, or {EMBEDDED}.")
    if base_url and len(parts) > 1:
        raise ModelMistake(f"--base-url speaks of one model, and --llm {llm} names several: give each as MODEL@URL.")
    members, weights = [], []
    for part in parts:
        spec, separator, weight = part.rpartition("=")
        members.append(_one(spec if separator else part, base_url, asking))
        weights.append(_weight(weight, part) if separator else 1.0)
    return members[0] if len(members) == 1 else Mixture(members, weights)


def elsewhere(llm: str, before: str) -> bool:
    """Whether `llm` says itself that it is served elsewhere than the model `before`, whose address is none of its."""
    llm = llm.strip()
    here, there = (each.strip().partition(":")[0] if ":" in each else "" for each in (llm, before))
    itself = llm == EMBEDDED or "," in llm or "://" in llm or llm.startswith(REPLAY)
    return itself or (here in PROVIDERS and here != there)


def priced(models: Models, prices: Mapping[str, Price]) -> dict[str, Price]:
    """`prices` with those of models that are known to cost nothing."""
    return {model.spec: (0.0, 0.0) for model in models.members if model.free} | dict(prices)


def _one(spec: str, base_url: str | None, asking: dict[str, Any]) -> LanguageModel:
    if spec.startswith(("http://", "https://")):
        return LanguageModel("", spec, provider=OTHER, spec=spec, **asking)
    name, at, url = spec.partition("@http")
    address = f"http{url}" if at else base_url
    prefix, colon, model = name.partition(":")
    if colon and prefix in PROVIDERS:
        if not model:
            raise ModelMistake(f"--llm {spec} names no model: give {prefix}:MODEL.")
        return LanguageModel(model, address, provider=PROVIDERS[prefix], spec=spec, **asking)
    if name == EMBEDDED or address:
        return LanguageModel(name, address, provider=OTHER, spec=spec, **asking)
    if colon:
        raise ModelMistake(
            f"'{prefix}' in --llm {spec} is no provider: known are {', '.join(PROVIDERS)}; or give the server's "
            "address, as MODEL@http://host:port/v1."
        )
    return LanguageModel(name, spec=spec, **asking)


def _weight(text: str, part: str) -> float:
    try:
        weight = float(text)
    except ValueError:
        weight = 0.0
    if not 0 < weight < math.inf:
        raise ModelMistake(f"'{text}' in --llm {part} is no weight: give a positive number, as in openai:MODEL=2.")
    return weight
