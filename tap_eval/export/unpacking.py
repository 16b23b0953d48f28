"""How a graph unpacks weights that its file has packed: a function of standard operators, written once a file.

All that it computes is constant: a runtime computes it when it loads the file, and has int8 weights
from then on. Eight numbers of B bits lie in B bytes; the eight bytes in which they begin, and
those after them, are taken as rows, which is fast, shifted to their place and put together.
"""

from __future__ import annotations

import onnx

DOMAIN, NAME = "tap", "Unpack"


def unpack() -> onnx.FunctionProto:
    """From rows (R, bytes) uint8, as `packing` packs them, to integers times `factor`, int8 of a `shape` (R, ...).

    And to as many zeros as there are rows, int8: the zero point of symmetric integers.
    """
    return onnx.parser.parse_function(_TEXT)


_TEXT = """
<domain: "tap", opset_import: ["": 21]>
Unpack <bits, factor, shape> (rows) => (integers, zero_point)
{
    bits = Constant <value_int: int = @bits> ()
    factor = Constant <value_int: int = @factor> ()
    shape = Constant <value_ints: ints = @shape> ()
    zero = Constant <value_int = 0> ()
    one = Constant <value_int = 1> ()
    two = Constant <value_int = 2> ()
    seven = Constant <value_int = 7> ()
    eight = Constant <value_int = 8> ()
    zeros = Constant <value_ints = [0]> ()
    ones = Constant <value_ints = [1]> ()
    rest = Constant <value_ints = [-1]> ()
    end = Constant <value_ints = [9223372036854775807]> ()
    column = Constant <value_ints = [-1, 1]> ()
    by_one = Constant <value = uint8 {1}> ()

    bytes = Shape <start = 1> (rows)
    less = Neg (bytes)
    missing = Mod (less, bits)
    filling = Concat <axis = 0> (zeros, zeros, zeros, missing)
    filled = Pad (rows, filling)
    width = Reshape (bits, ones)
    eights = Concat <axis = 0> (rest, width)
    grouped = Reshape (filled, eights)
    columns = Transpose <perm = [1, 0]> (grouped)

    eight_places = Range (zero, eight, one)
    begins = Mul (eight_places, bits)
    first = Div (begins, eight)
    after = Add (first, one)
    last = Sub (bits, one)
    second = Min (after, last)
    off = Mod (begins, eight)
    beside = Sub (seven, off)
    off_bytes = Cast <to = 2> (off)
    beside_bytes = Cast <to = 2> (beside)
    down = Reshape (off_bytes, column)
    up = Reshape (beside_bytes, column)
    first_bytes = Gather (columns, first)
    second_bytes = Gather (columns, second)
    lower = BitShift <direction = "RIGHT"> (first_bytes, down)
    moved = BitShift <direction = "LEFT"> (second_bytes, by_one)
    upper = BitShift <direction = "LEFT"> (moved, up)
    both = BitwiseOr (lower, upper)
    levels = Pow (two, bits)
    greatest = Sub (levels, one)
    mask = Cast <to = 2> (greatest)
    masked = BitwiseAnd (both, mask)
    unsigned = Transpose <perm = [1, 0]> (masked)

    half = Div (levels, two)
    offset = Cast <to = 1> (half)
    step = Cast <to = 1> (factor)
    numbers = Cast <to = 1> (unsigned)
    centred = Sub (numbers, offset)
    spread = Mul (centred, step)
    signed = Cast <to = 3> (spread)

    count = Shape <start = 0, end = 1> (rows)
    wide = Concat <axis = 0> (count, rest)
    lines = Reshape (signed, wide)
    filter = Slice (shape, ones, end)
    length = ReduceProd (filter)
    cut = Slice (lines, zeros, length, ones)
    integers = Reshape (cut, shape)
    zero_point = ConstantOfShape <value = int8[1] {0}> (count)
}
"""
