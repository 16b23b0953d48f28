"""What `tap-agent inspect` shows of a network in a file: its layers, what else is in it, and what it says of itself."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table

from tap_agent.sessions.inspection import Inspected
from tap_agent.terminal.console import cell
from tap_eval.export.description import Description, LayerDescription


def shown(inspected: Inspected) -> RenderableType:
    """The tables of one network."""
    description = inspected.description
    parts: list[RenderableType] = [f"[bold]{cell(inspected.origin)}[/bold]: {cell(description.form)}"]
    parts += [f"[red]{cell(inspected.note)}[/red]"] if inspected.note else []
    parts += [_layers(description), f"{'; '.join(_sizes(description))}\n"]
    parts += [_about(description.about)] if description.about else []
    return Group(*parts)


def _layers(description: Description) -> Table:
    """Kinds of storage have a column where there are several."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    several = len({layer.stored for layer in description.layers}) > 1
    table.add_column("layer", overflow="fold")
    table.add_column("weight", overflow="fold")
    table.add_column("bits", overflow="fold")
    if several:
        table.add_column("stored as", overflow="fold")
    for name in ("bytes", "scales", "input"):
        table.add_column(name, justify="right", overflow="fold")
    for layer in description.layers:
        table.add_row(
            cell(layer.name), cell(f"{layer.kind} {'x'.join(map(str, layer.shape))}"), _bits(layer.bits),
            *([cell(layer.stored)] if several else []), "" if layer.size is None else f"{layer.size:,}",
            _range(layer.scales), _input(layer),
        )  # fmt: skip
    if description.between:
        table.add_section()
    for value in description.between:
        made, reach = cell(value.made), f"{_range(value.reach)}, 8 bits"
        table.add_row(cell(value.name), made, "8", *([""] if several else []), f"{value.size:,}", "", reach)
    if description.in_float:
        table.add_section()
    for name, size in description.in_float.items():
        table.add_row(cell(name), "", "float", *([""] if several else []), f"{size:,}", "", "")
    return table


def _sizes(description: Description) -> Iterator[str]:
    stored = {layer.stored for layer in description.layers}
    if len(stored) == 1 and (only := stored.pop()):
        yield f"weights are stored as {only}"
    if description.size is not None:
        yield f"{description.size:,} bytes of values"
    if description.overhead is not None:
        yield f"{description.overhead:,} bytes of names, shapes and what is below"


def _bits(bits: Mapping[int, int]) -> str:
    """One number, or each with the number of its channels."""
    if len(bits) == 1:
        return str(*bits)
    return ", ".join(f"{each} ({count})" for each, count in sorted(bits.items()))


def _input(layer: LayerDescription) -> str:
    return ", ".join(filter(None, (_range(layer.inputs), f"{layer.activation_bits} bits")))


def _range(ends: tuple[float, float] | None) -> str:
    return "" if ends is None else f"{ends[0]:.2g} to {ends[1]:.2g}"


def _about(about: Mapping[str, str]) -> Table:
    table = Table(show_header=False, box=None, pad_edge=False)
    table.add_column(style="bold", no_wrap=True, min_width=max(map(len, about)))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for name, text in about.items():
        table.add_row(cell(name), cell(" ".join(text.split())))
    return table
