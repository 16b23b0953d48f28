"""What a run is made of: every setting with its default, its bounds and its meaning."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, NonNegativeFloat, field_validator
from pydantic_core import PydanticCustomError

from agents.models import REPLAY
from agents.parameters import Parameter
from graphs.controller import Controller
from tap_eval.images.images import Transform
from tap_eval.proxies.features import Inputs

Track = Literal["mlflow", "tensorboard"]
HIDDEN = "hidden"
"""the type of an error whose input is shown to nobody"""


def _resolved(path: Path) -> Path:
    try:
        return path.expanduser().resolve()
    except RuntimeError as error:  # a home of nobody's
        raise ValueError(f"{path} is no path here: {error}") from error


class NetworkSettings(BaseModel):
    """One network of the benchmark set, with its images."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    network: str = "digits"
    weights: Path | None = None
    """a state dict on disk"""
    weights_entry: str | None = None
    """torchvision's weights, as IMAGENET1K_V1, which are meant, or from which those on disk come"""
    images: str = "digits"
    calibration: str | None = None
    """a source of its own for the calibration images"""
    classes: Path | None = None
    """a file of the names of all classes in the order of the network's outputs, in place of the image source's order"""
    search: int | None = Field(None, ge=1)
    """the first rows of `images`, on which candidates are measured"""
    test: int | None = Field(None, ge=1)
    """the last rows of `images`, on which the result is reported"""
    transform: Transform | None = None
    """in place of what torchvision's weights or the image source declare"""
    output: str | None = None
    """name of the logits, where the network returns several tensors: a key, a field, or a place as in `0`"""
    budget: str | None = None
    """in place of the run's"""

    @field_validator("weights", "classes")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        """A run can be resumed from any folder."""
        return path and _resolved(path)

    @field_validator("images", "calibration")
    @classmethod
    def _absolute_source(cls, source: str | None) -> str | None:
        kind, separator, where = (source or "").partition(":")
        return f"{kind}:{_resolved(Path(where))}" if separator and where else source


class Settings(BaseModel):
    """Everything that a run depends on, apart from the content of the files that it names."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True)
    networks: tuple[NetworkSettings, ...] = Field((NetworkSettings(),), min_length=1)
    """the benchmark set: a proxy is worth what it achieves on all of them"""
    budget: str = "3bit"
    bits: tuple[int, ...] = (2, 4, 8)
    activation_bits: tuple[int, ...] = (8,)
    channel_groups: int = Field(4, ge=1)
    """groups of output channels into which a layer may be cut, each with bits of its own; 1 is bits a layer"""
    pin_ends: bool = False
    """hold the first and the last layer at the most bits"""
    inputs: Inputs = "statistics"
    calibration_images: int = Field(16, ge=1)
    """a draw"""
    calibration_draws: int = Field(5, ge=1)
    """draws for the final table; the search uses the first alone"""
    llm: str = "embedded"
    """embedded, PROVIDER:MODEL, the address of a server, replay:FILE, or several with weights"""
    base_url: str | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    """with which language models sample"""
    answer_tokens: int = Field(8192, ge=1)
    """the most that an answer of a language model may have, its reasoning included"""
    leave_out: tuple[Parameter, ...] = ()
    """what a server of language models refuses, left out of requests from the start and not after a refusal"""
    call_seconds: float = Field(180.0, gt=0)
    """wall time of a call of a language model, with all its tries"""
    prices: dict[str, tuple[NonNegativeFloat, NonNegativeFloat]] = {}
    """USD for a million tokens in and for a million out, by the name that `llm` gives a model"""
    max_cost: float | None = Field(None, ge=0)
    """USD; like the other two over all sessions of the run"""
    max_calls: int | None = Field(None, ge=1)
    max_minutes: float | None = Field(None, ge=0)
    cache_llm: bool = False
    """keep answers of language models for other runs, and take those that are kept"""
    sandbox: Literal["monty", "e2b"] = "monty"
    population: int = Field(8, ge=1)
    generations: int = Field(5, ge=0)
    controller: Controller = "ratio"
    rounds: int = Field(3, ge=1)
    """proposals that an agent may submit before it is given up"""
    allowance: int = Field(1, ge=0)
    """measurements that an agent may ask for"""
    alpha: float = Field(0.1, ge=0, le=1)
    beta: float = Field(0.0, ge=0)
    gamma: float = Field(0.0, ge=0)
    batch: int = Field(125, ge=1)
    """images a forward pass in floating point; integers take batches of their own"""
    packed_mib: int = Field(1024, ge=1)
    """MiB of weights that are kept in the layout of the integer kernels, a network"""
    features_mib: int = Field(512, ge=1)
    """MiB that are in use while features of layers are computed, about"""
    images_mib: int = Field(2048, ge=0)
    """MiB of decoded images that are kept in memory, a split; more are kept in a file"""
    racing: float = Field(0.0, ge=0, lt=0.5)
    """error rate with which a candidate is dropped before it has seen all images; 0 measures every one on all"""
    executor: Literal["local", "ray"] = "local"
    """where allocations are measured"""
    address: str | None = None
    """of a Ray cluster, host:port or auto; without one, ray starts here"""
    track: Track | None = None
    """where the run is followed beside its own folder"""
    seed: int = 0

    @field_validator("base_url", "llm")
    @classmethod
    def _without_secret(cls, text: str | None) -> str | None:
        """Settings are written to the run folder, so a key has no place in them."""
        addresses = [member.partition("//")[2] for member in (text or "").split(",")]
        user = re.search(r"//[^/?#]*@(?!https?://)", text or "")  # a password may hold a comma
        if user or any(re.search("[?#]", address) for address in addresses):
            raise PydanticCustomError(
                HIDDEN,
                "it is written to the run's files, so leave out of the address what stands before @ and after ?, "
                "and give the key in OPENAI_API_KEY",
            )
        return text

    @field_validator("llm")
    @classmethod
    def _absolute_replay(cls, llm: str) -> str:
        """A run can be resumed from any folder."""
        path = llm.removeprefix(REPLAY)
        return llm if path == llm else f"{REPLAY}{_resolved(Path(path))}"
