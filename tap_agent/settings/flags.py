"""The flags that commands share, and how they become settings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

_NETWORK, _BITS, _SEARCH, _MODEL = "Network and images", "Bits and budget", "Search", "Language model and sandbox"

ConfigOption = Annotated[Path | None, typer.Option("--config", help="YAML file of settings; flags win over it.")]
NetworkOption = Annotated[
    str | None,
    typer.Option(
        help="digits, cifar_resnet20/32/44/56, a torchvision classifier, or package.module:factory.",
        rich_help_panel=_NETWORK,
    ),
]
WeightsOption = Annotated[Path | None, typer.Option(help="State dict of the network.", rich_help_panel=_NETWORK)]
ImagesOption = Annotated[
    str | None,
    typer.Option(help="digits, parquet:FILE, imagefolder:DIR or cifar10:DIR.", rich_help_panel=_NETWORK),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(help="Image source of the calibration images, if not --images.", rich_help_panel=_NETWORK),
]
SearchRowsOption = Annotated[
    int | None, typer.Option("--search", help="Images to measure candidates on: the first.", rich_help_panel=_NETWORK)
]
TestRowsOption = Annotated[
    int | None, typer.Option("--test", help="Images to report the result on: the last.", rich_help_panel=_NETWORK)
]
TransformOption = Annotated[
    str | None,
    typer.Option(help="In place of the image source's own, as resize=256,crop=224.", rich_help_panel=_NETWORK),
]
BudgetOption = Annotated[
    str | None,
    typer.Option(help="3bit (on average), 87% (smaller), 0.1MB, or 1.2GBOPs.", rich_help_panel=_BITS),
]
BitsOption = Annotated[str | None, typer.Option(help="Bits that weights may take, as 2,4,8.", rich_help_panel=_BITS)]
ActivationBitsOption = Annotated[
    str | None, typer.Option(help="Bits that activations may take, as 8 or 4,8.", rich_help_panel=_BITS)
]
GroupsOption = Annotated[
    int | None,
    typer.Option(
        "--channel-groups", help="Groups of output channels a layer, each with bits of its own.", rich_help_panel=_BITS
    ),
]
DrawsOption = Annotated[
    int | None,
    typer.Option("--draws", help="Draws of calibration images in the final table.", rich_help_panel=_NETWORK),
]
PinEndsOption = Annotated[
    bool | None,
    typer.Option("--pin-ends/--no-pin-ends", help="Hold the first and last layer at most bits.", rich_help_panel=_BITS),
]
InputsOption = Annotated[
    Literal["statistics", "metadata"] | None,
    typer.Option(help="What a proxy may see: statistics of layers too, or metadata alone.", rich_help_panel=_SEARCH),
]
SeedOption = Annotated[int | None, typer.Option(help="Seed of every random draw.", rich_help_panel=_SEARCH)]
ExecutorOption = Annotated[
    Literal["local", "ray"] | None, typer.Option(help="Where allocations are measured.", rich_help_panel=_SEARCH)
]
AddressOption = Annotated[
    str | None, typer.Option(help="Of a Ray cluster, host:port or auto.", rich_help_panel=_SEARCH)
]
SandboxOption = Annotated[str | None, typer.Option(help="Where proxies run: monty or e2b.", rich_help_panel=_MODEL)]
GenerationsOption = Annotated[int | None, typer.Option(help="After the initial one.", rich_help_panel=_SEARCH)]
PopulationOption = Annotated[int | None, typer.Option(help="Offspring a generation.", rich_help_panel=_SEARCH)]
ControllerOption = Annotated[
    Literal["ratio", "dpo", "uniform"] | None,
    typer.Option(help="How template weights are learned.", rich_help_panel=_SEARCH),
]
AlphaOption = Annotated[
    float | None, typer.Option(help="Share of the rank correlation in fitness.", rich_help_panel=_SEARCH)
]
BetaOption = Annotated[float | None, typer.Option(help="Weight of cost.", rich_help_panel=_SEARCH)]
GammaOption = Annotated[float | None, typer.Option(help="Weight of novelty.", rich_help_panel=_SEARCH)]
RacingOption = Annotated[
    float | None,
    typer.Option(help="Error rate of dropping a candidate early; 0 for never.", rich_help_panel=_SEARCH),
]
LLMOption = Annotated[
    str | None,
    typer.Option(
        help="embedded; PROVIDER:MODEL with openai, deepseek, qwen, xai, ollama, vllm or llamacpp; a server's URL, "
        "MODEL@URL, or MODEL at --base-url; several as A=2,B=1; replay:FILE.",
        rich_help_panel=_MODEL,
    ),
]
BaseURLOption = Annotated[str | None, typer.Option(help="Of any OpenAI-compatible server.", rich_help_panel=_MODEL)]
CacheLLMOption = Annotated[
    bool | None,
    typer.Option("--cache-llm/--no-cache-llm", help="Keep and reuse the models' answers.", rich_help_panel=_MODEL),
]
MaxCostOption = Annotated[
    float | None,
    typer.Option(min=0, help="USD that the run may spend; needs `prices` in the config.", rich_help_panel=_MODEL),
]
MaxCallsOption = Annotated[
    int | None, typer.Option(min=1, help="Calls of language models that the run may send.", rich_help_panel=_MODEL)
]
MaxMinutesOption = Annotated[
    float | None, typer.Option(min=0, help="Time after which the run calls no model.", rich_help_panel=_MODEL)
]


TrackOption = Annotated[
    Literal["mlflow", "tensorboard"] | None,
    typer.Option(help="Follow the run there too, through an extra of the same name.", rich_help_panel=_SEARCH),
]


RENAMED = {"search_rows": "search", "test_rows": "test", "draws": "calibration_draws"}
"""parameters of a command that do not have the name of their setting"""


def given(values: dict[str, Any], *without: str) -> dict[str, Any]:
    """The flags of a command as settings."""
    from tap_agent.settings.read import parse_bits, parse_transform

    flags = {name: value for name, value in values.items() if name not in without}
    for name, field in RENAMED.items():
        if name in flags:
            flags[field] = flags.pop(name)
    for name, parse in (("bits", parse_bits), ("activation_bits", parse_bits), ("transform", parse_transform)):
        if flags.get(name):
            flags[name] = parse(flags[name])
    return flags
