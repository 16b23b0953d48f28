"""An image of any of Pillow's modes becomes one of 8 bits, and what it loses on the way is remarked on.

Where no values are lost, this is what torchvision's loaders make of an image: palettes are
looked up, CMYK and LAB become RGB, transparency is left out, and the EXIF orientation is not
applied. They clip what has more than 8 bits; here it is scaled, or refused.
"""

from __future__ import annotations

from contextlib import suppress

import numpy as np
from PIL import Image

from tap_eval.images.images import Remark, Transform

FRAMES = "have several frames, of which the first is taken"
TRANSPARENT = "have transparency, which is left out"
TURNED = (
    "are taken as they are stored, though their EXIF data turn them: turn the files if the network was trained on "
    "upright ones"
)
_ORIENTATION, _UPRIGHT, _TURNED = 0x0112, 1, range(2, 9)
_PHOTOMETRIC, _WHITE_IS_ZERO = 262, 0


class RangeMistake(Exception):
    """Values that no 8 bits stand for; `str()` of it follows the name of an image."""


def in_eight_bits(image: Image.Image, transform: Transform) -> tuple[Image.Image, tuple[Remark, ...]]:
    """An opened image in mode L or RGB, with what is to be said of it.

    In images of 16 bits and more, 0 to `transform.white` become 0 to 255; without it, white is
    65,535 for integers (4,095 where a file says 12 bits) and 1 for floats. Raises
    `RangeMistake` where values are outside, and whatever a decoder makes of a damaged file.
    """
    remarks = []
    if getattr(image, "n_frames", 1) > 1:
        remarks.append(Remark(FRAMES))
    packed = str(getattr(image, "tile", ""))
    image.load()
    with suppress(Exception):  # odd EXIF data do not make an image unreadable
        if image.getexif().get(_ORIENTATION, _UPRIGHT) in _TURNED:
            remarks.append(Remark(TURNED))
    if image.mode == "F" or image.mode.startswith("I"):
        image, remark = _scaled(image, transform, 4095.0 if "I;12" in packed else 65535.0)
        return image, (*remarks, remark)
    if ";16" in packed:  # Pillow keeps the upper byte of each channel
        remarks.append(Remark("have 16 bits a channel, which are brought to 8"))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        if image.getchannel("A").getextrema()[0] != 255:
            remarks.append(Remark(TRANSPARENT))
    return (image if image.mode == "L" else image.convert("RGB")), tuple(remarks)


def _scaled(image: Image.Image, transform: Transform, most: float) -> tuple[Image.Image, Remark]:
    """An image of one wide channel, as mode L."""
    floats = image.mode == "F"
    kind = "floats" if floats else "integers of 32 bits" if image.mode == "I" else "integers of 16 bits"
    white = transform.white or (1.0 if floats else most)
    values = np.asarray(image).astype(np.float32)
    least, greatest = float(values.min()), float(values.max())
    levels = np.rint(values * np.float32(255 / white))
    if not np.isfinite(levels).all():
        raise RangeMistake("has floats that are not finite: convert such images to 8 bits.")
    if levels.min() < 0:
        raise RangeMistake(
            f"has {kind} from {least:,.6g} to {greatest:,.6g}, of which those below 0 are no brightness: convert such "
            "images to 8 bits."
        )
    if levels.max() > 255:
        raise RangeMistake(
            f"has {kind} up to {greatest:,.6g}, where {white:,.6g} is white: give what is, for all images, "
            f"with --transform {transform.text(white='VALUE')}, or convert such images to 8 bits."
        )
    if getattr(image, "tag_v2", {}).get(_PHOTOMETRIC) == _WHITE_IS_ZERO:
        levels = 255 - levels
    remark = Remark(f"have {kind}, of which 0 to {white:,.6g} are brought to 8 bits", greatest=greatest, white=white)
    return Image.fromarray(levels.astype(np.uint8)), remark
