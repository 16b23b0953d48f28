"""What a run is made of: every setting with its default, its bounds, its meaning and its flag.

A setting is declared here alone. Flags, their help, the page's form, Studio's form and the tables of the docs are made
from what stands here, so that nothing which takes long to import may be imported here.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    NonNegativeFloat,
    ValidationInfo,
    field_validator,
)
from pydantic_core import CoreSchema, PydanticCustomError

from tap_agent.settings.flag import BITS, MODEL, NETWORK, SEARCH, Flag

HIDDEN = "hidden"
"""the type of an error whose input is shown to nobody"""
Track = Literal["mlflow", "tensorboard"]

if TYPE_CHECKING:
    from tap_eval.images.images import Transform
else:

    class Transform:
        """Stands for the real one until the first settings are made: its module imports torch, which takes seconds."""

        @classmethod
        def __get_pydantic_core_schema__(cls, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
            from tap_eval.images.images import Transform

            return handler.generate_schema(Transform)


def _resolved(path: Path) -> Path:
    try:
        return path.expanduser().resolve()
    except RuntimeError as error:  # a home of nobody's
        raise ValueError(f"{path} is no path here: {error}") from error


def _holds_truth(value: object) -> bool:
    """Whether true or false is in it."""
    if isinstance(value, dict):
        return any(map(_holds_truth, value.values()))
    return any(map(_holds_truth, value)) if isinstance(value, list | tuple) else isinstance(value, bool)


class _Model(BaseModel):
    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, defer_build=True, allow_inf_nan=False
    )

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth(cls, value: object, info: ValidationInfo) -> object:
        """YAML takes `yes` for true, which would count as 1."""
        numbers = re.search(r"\b(int|float)\b", str(cls.model_fields[str(info.field_name)].annotation))
        if numbers and _holds_truth(value):
            raise PydanticCustomError("number", "that is no number: give one")
        return value


class NetworkSettings(_Model):
    """One network of the benchmark set, with its images."""

    network: Annotated[str, Flag(NETWORK, "run apply", label="Network", common=True)] = "digits"
    """digits, cifar_resnet20/32/44/56, efficientnet_lite0/1/2, a torchvision classifier, timm:NAME, hf:NAME, or
    package.module:factory."""
    weights: Annotated[Path | None, Flag(NETWORK, "run apply", label="Weights", common=True)] = None
    """State dict of the network."""
    weights_entry: Annotated[str | None, Flag(NETWORK, "run apply")] = None
    """torchvision's weights, as IMAGENET1K_V1, which are meant, or from which those on disk come."""
    output: Annotated[str | None, Flag(NETWORK, "run apply")] = None
    """Name of the logits where the network returns several tensors: a key, a field, or a place as in 0."""
    images: Annotated[str, Flag(NETWORK, "run apply", label="Images", common=True)] = "digits"
    """digits, parquet:FILE, imagefolder:DIR or cifar10:DIR."""
    calibration: Annotated[str | None, Flag(NETWORK, "run apply", label="Calibration images", common=True)] = None
    """Image source of the calibration images, if not --images; distilled are made of noise, by batch normalization."""
    classes: Annotated[Path | None, Flag(NETWORK, "run apply", label="Classes")] = None
    """File of the names of all classes in the order of the network's outputs, in place of the images' own order."""
    search: Annotated[int | None, Flag(NETWORK, "run apply", label="Search images")] = Field(None, ge=1)
    """Images to measure candidates on: the first."""
    test: Annotated[int | None, Flag(NETWORK, "run apply", label="Test images")] = Field(None, ge=1)
    """Images to report the result on: the last."""
    transform: Annotated[Transform | None, Flag(NETWORK, "run apply")] = None
    """In place of what torchvision's weights or the image source declare, as resize=256,crop=224."""
    latencies: Annotated[Path | None, Flag(NETWORK, "run apply", label="Latencies")] = None
    """CSV file of what layers take on the device: layer, weight_bits, activation_bits, ms; for a budget in time."""
    budget: str | None = None
    """In place of the run's."""

    @field_validator("weights", "classes", "latencies")
    @classmethod
    def _absolute(cls, path: Path | None) -> Path | None:
        """A run can be resumed from any folder."""
        return path and _resolved(path)

    @field_validator("images", "calibration")
    @classmethod
    def _absolute_source(cls, source: str | None) -> str | None:
        kind, separator, where = (source or "").partition(":")
        return f"{kind}:{_resolved(Path(where))}" if separator and where else source

    @field_validator("transform", mode="before")
    @classmethod
    def _pairs(cls, given: object) -> object:
        """On the command line it is `resize=256,crop=224,interpolation=bicubic`."""
        if not isinstance(given, str):
            return given
        pairs = [part.partition("=") for part in given.split(",")]
        return {name.strip(): value.strip() for name, _, value in pairs}


class Settings(_Model):
    """Everything that a run depends on, apart from the content of the files that it names."""

    networks: tuple[NetworkSettings, ...] = Field(default_factory=lambda: (NetworkSettings(),), min_length=1)
    """The benchmark set: a proxy is worth what it achieves on all of them."""
    budget: Annotated[str, Flag(BITS, "run", label="Budget", common=True)] = "3bit"
    """Of weights alone 3bit (on average) or 87% (smaller), of the whole network 0.1MB, 1.2GBOPs, or 2ms. Of several, \
as in 2.25bit,3bit, candidates are measured at each, and the first counts in the table."""
    second_budget: Annotated[bool, Flag(BITS, "run")] = True
    """Measure candidates at a second budget too, a fifth above the one that is given if there is but one."""
    bits: Annotated[tuple[int, ...], Flag(BITS, "run apply", label="Bits", common=True)] = (2, 4, 8)
    """Bits that weights may take, as 2,4,8."""
    activation_bits: Annotated[tuple[int, ...], Flag(BITS, "run apply")] = (8,)
    """Bits that activations may take, as 8 or 4,8."""
    channel_groups: Annotated[int, Flag(BITS, "run apply", label="Channel groups")] = Field(4, ge=1)
    """Groups of output channels a layer, each with bits of its own. 1 is bits a layer."""
    pin_ends: Annotated[bool, Flag(BITS, "run apply")] = False
    """Hold the first and last layer at most bits."""
    rounding: Annotated[Literal["gptq", "nearest"], Flag(BITS, "run apply", usage=True)] = "gptq"
    """How weights become integers: gptq, which looks at calibration images, or nearest."""
    sums: Annotated[Literal["int8", "float"], Flag(BITS, "run apply", usage=True)] = "int8"
    """What is added, pooled and joined between convolutions: int8, in 8 bits as integer runtimes have it, or float."""
    activation_ranges: Annotated[
        Literal["minmax", "ema", "percentile", "omse"], Flag(BITS, "run apply", usage=True)
    ] = "minmax"
    """How the range of an activation is chosen from calibration images: minmax, from the least number to the \
greatest; ema, moving averages of both over images; percentile, without a thousandth at either end; omse, of least \
squared error."""
    attention_activations: Annotated[Literal["8", "off"], Flag(BITS, "run apply", usage=True)] = "8"
    """Bits of what attention multiplies, queries, keys, probabilities and values: 8, or off for float32."""
    finish: Annotated[bool, Flag(BITS, "run apply")] = True
    """Round each network of the final table once more, layer after layer, for the inputs that layers then get."""
    calibration_images: Annotated[int, Flag(NETWORK, "run apply")] = Field(16, ge=1)
    """Images of one draw for calibration."""
    calibration_draws: Annotated[int, Flag(NETWORK, "run", "draws", label="Calibration draws")] = Field(5, ge=1)
    """Draws of calibration images in the final table. The search uses the first alone, and so does `apply` unless its \
own --draws asks for more."""
    generations: Annotated[int, Flag(SEARCH, "run", label="Generations", common=True)] = Field(5, ge=0)
    """After the initial one."""
    population: Annotated[int, Flag(SEARCH, "run", label="Population", common=True)] = Field(8, ge=1)
    """Offspring a generation."""
    controller: Annotated[Literal["ratio", "paper", "dpo", "uniform"], Flag(SEARCH, "run", usage=True)] = "ratio"
    """How template weights are learned: ratio and dpo by what offspring gain over their parents, paper by fitness as \
Eq. 7 has it."""
    worth: Annotated[str, Flag(SEARCH, "run", label="Worth")] = "kl"
    """What counts in fitness: kl, exp(-KL) of outputs from full precision, the paper's accuracy, or benchmark:FILE. \
The last judges scores by the measured allocations in a file of `tap-agent benchmark build`, and measures none."""
    alpha: Annotated[float, Flag(SEARCH, "run")] = Field(0.05, ge=0, le=1)
    """Share of the rank correlation in fitness."""
    beta: Annotated[float, Flag(SEARCH, "run")] = Field(0.0, ge=0)
    """Weight of cost."""
    gamma: Annotated[float, Flag(SEARCH, "run")] = Field(0.0, ge=0)
    """Weight of novelty."""
    racing: Annotated[float, Flag(SEARCH, "run", label="Racing")] = Field(0.0, ge=0, lt=1)
    """Error rate of dropping a candidate early; 0 for never. A candidate is dropped before it has seen all images."""
    inputs: Annotated[Literal["statistics", "metadata"], Flag(SEARCH, "run apply", usage=True)] = "statistics"
    """What a proxy may see: statistics of layers too, or metadata alone."""
    llm: Annotated[str, Flag(MODEL, "run chat", label="Language model", common=True)] = "embedded"
    """embedded; PROVIDER:MODEL with openai, deepseek, qwen, xai, ollama, vllm or llamacpp; a server's URL, \
MODEL@URL, or MODEL at --base-url; several as A=2,B=1; replay:FILE."""
    base_url: Annotated[str | None, Flag(MODEL, "run chat", label="Base URL", common=True)] = None
    """Of any OpenAI-compatible server."""
    temperature: float = Field(1.0, ge=0, le=2)
    """With which language models sample."""
    answer_tokens: int = Field(8192, ge=1)
    """The most that an answer of a language model may have, its reasoning included."""
    leave_out: tuple[Literal["seed", "temperature", "max_tokens", "tool_choice"], ...] = ()
    """What a server of language models refuses, left out of requests from the start and not after a refusal."""
    call_seconds: float = Field(180.0, gt=0)
    """Wall time of a call of a language model, with all its tries."""
    prices: dict[str, tuple[NonNegativeFloat, NonNegativeFloat]] = {}
    """USD for a million tokens in and for a million out, by the name that `llm` gives a model."""
    cache_llm: Annotated[bool, Flag(MODEL, "run")] = False
    """Keep and reuse the models' answers. Other runs take those that are kept."""
    max_cost: Annotated[float | None, Flag(MODEL, "run resume", usage=True, label="Most cost")] = Field(None, ge=0)
    """USD that the run may spend; needs `prices` in the config. As the other two limits, over all sessions."""
    max_calls: Annotated[int | None, Flag(MODEL, "run resume", usage=True, label="Most calls")] = Field(None, ge=1)
    """Calls of language models that the run may send."""
    max_minutes: Annotated[float | None, Flag(MODEL, "run resume", usage=True, label="Most minutes")] = Field(
        None, ge=0
    )
    """Time after which the run calls no model."""
    sandbox: Annotated[Literal["monty", "e2b"], Flag(MODEL, "run apply")] = "monty"
    """Where proxies run: monty or e2b."""
    rounds: int = Field(3, ge=1)
    """Proposals that an agent may submit before it is given up."""
    allowance: int | None = Field(None, ge=0)
    """Measurements that an agent may ask for. Unset, 3 where search images times multiply-accumulates of an image are \
below 1e12, about ten seconds of a CPU core, and else 1."""
    keep_checkpoints: Annotated[Literal["last", "all"], Flag(SEARCH, "run resume", usage=True)] = "last"
    """Which steps of the search stay in its folder: the last, from which it goes on, or all, which Studio can go back \
to. All of them take about 20 KiB a candidate, and the last takes 1."""
    executor: Annotated[Literal["local", "ray"], Flag(SEARCH, "run apply resume", usage=True)] = "local"
    """Where allocations are measured."""
    address: Annotated[str | None, Flag(SEARCH, "run apply resume")] = None
    """Of a Ray cluster, host:port or auto. Without one, ray starts here."""
    device: Annotated[str, Flag(SEARCH, "run apply resume chat", label="Device")] = "auto"
    """Where a network is run to be measured: auto, cpu, cuda, cuda:N or mps. auto takes all CUDA devices, or else the \
CPU; cuda takes all of them, cuda:N one."""
    baselines: Annotated[tuple[str, ...], Flag(SEARCH, "run apply", label="Baselines")] = ("fast",)
    """What the table compares with: fast, all, or names of baselines, as uniform,hawq_v2."""
    track: Annotated[Track | None, Flag(SEARCH, "run", usage=True)] = None
    """Follow the run there too, through an extra of the same name."""
    batch: int = Field(125, ge=1)
    """Images a forward pass in floating point; integers take batches of their own."""
    packed_mib: int = Field(1024, ge=1)
    """MiB of weights that are kept in the layout of the integer kernels, a network."""
    features_mib: int = Field(512, ge=1)
    """MiB that are in use while features of layers are computed, about."""
    moments_mib: int = Field(512, ge=1)
    """MiB of second moments of layers' inputs that a thread holds; a layer above it is rounded in blocks of inputs."""
    images_mib: int = Field(2048, ge=0)
    """MiB of decoded images that are kept in memory, a split; more are kept in a file."""
    seed: Annotated[int, Flag(SEARCH, "run apply", label="Seed", common=True)] = Field(0, ge=0, le=2**32 - 1)
    """Seed of every random draw."""

    @field_validator("bits", "activation_bits", mode="before")
    @classmethod
    def _listed(cls, given: object) -> object:
        """On the command line they are `2,4,8`."""
        if not isinstance(given, str):
            return given
        try:
            return tuple(int(part) for part in given.split(","))
        except ValueError as error:
            raise PydanticCustomError(
                "bits", "'{given}' are no bits: give whole numbers from 2 to 8, as in 2,4,8", {"given": given}
            ) from error

    @field_validator("attention_activations", mode="before")
    @classmethod
    def _plain(cls, given: object) -> object:
        """In YAML, off is false and 8 a number."""
        return "off" if given is False else "8" if given == 8 else given

    @field_validator("baselines", mode="before")
    @classmethod
    def _names(cls, given: object) -> object:
        """On the command line they are `uniform,hawq_v2`."""
        return tuple(part.strip() for part in given.split(",")) if isinstance(given, str) else given

    @field_validator("baselines")
    @classmethod
    def _known_baselines(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from tap_eval.baselines.baselines import BaselineMistake, named

        try:
            named(names)
        except BaselineMistake as mistake:
            raise PydanticCustomError("baselines", "{why}", {"why": str(mistake).removesuffix(".")}) from mistake
        return names

    @field_validator("device")
    @classmethod
    def _known(cls, device: str) -> str:
        """Whether it is there shows when it is used: a run may be resumed on another machine."""
        from tap_eval.device import NAMES

        if not re.fullmatch(NAMES, device):
            raise PydanticCustomError(
                "device", "'{given}' is no device: give auto, cpu, cuda, cuda:N or mps", {"given": device}
            )
        return device

    @field_validator("worth")
    @classmethod
    def _known_worth(cls, worth: str) -> str:
        """The file's path becomes absolute: a run can be resumed from any folder."""
        kind, _, file = worth.partition(":")
        if kind == "benchmark" and file:
            return f"benchmark:{_resolved(Path(file))}"
        if worth in ("kl", "accuracy"):
            return worth
        raise PydanticCustomError(
            "worth", "'{given}' is no worth: give kl, accuracy or benchmark:FILE", {"given": worth}
        )

    @field_validator("racing")
    @classmethod
    def _measured(cls, racing: float, info: ValidationInfo) -> float:
        if racing and str(info.data.get("worth")).startswith("benchmark:"):
            raise PydanticCustomError(
                "racing", "with --worth benchmark:FILE no candidate is measured, so none can race: leave --racing out"
            )
        return racing

    @property
    def proposals(self) -> int:
        """Of a whole search."""
        return self.population * (self.generations + 1)

    @property
    def files(self) -> list[Path]:
        """All files that are named and read."""
        named = [file for each in self.networks for file in (each.weights, each.classes, each.latencies)]
        sources = [source for each in self.networks for source in (each.images, each.calibration) if source]
        places = [Path(source.partition(":")[2]) for source in sources if ":" in source]
        return [*filter(None, [*named, self.given]), *places]

    @property
    def given(self) -> Path | None:
        """The file of measured allocations by which candidates are judged."""
        kind, _, file = self.worth.partition(":")
        return Path(file) if kind == "benchmark" else None

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
        from agents.models import REPLAY

        path = llm.removeprefix(REPLAY)
        return llm if path == llm else f"{REPLAY}{_resolved(Path(path))}"
