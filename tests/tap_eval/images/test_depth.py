"""Images of every kind become 8 bits without a silent loss."""

from __future__ import annotations

import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from PIL import __version__ as pillow
from torchvision.datasets.folder import pil_loader

from tap_agent.settings.read import read_settings
from tap_eval.images.images import Splits, Transform
from tap_eval.images.sources import open_source, split
from tap_eval.mistake import ImagesMistake
from tests.tap_eval.images.pictures import saved, write_folder, write_parquet

OLD = int(pillow.partition(".")[0]) < 13
RAMP = np.tile(np.linspace(0, 1, 16), (16, 1))
LEVELS = np.rint(RAMP * 255).astype(np.uint8)
SIXTEEN = (RAMP * 65535).astype(np.uint16)
RGBA = Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 4), dtype=np.uint8))


def png(header: bytes, pixels: bytes = b"") -> bytes:
    """By hand: Pillow writes no colour of 16 bits, and no header that promises more than there is."""
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(pixels)), (b"IEND", b""))
    packed = (struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
              for kind, data in chunks)  # fmt: skip
    return b"\x89PNG\r\n\x1a\n" + b"".join(packed)


def of_many(folder: Path, image: bytes, kind: str, count: int = 1, transform: Transform | None = None) -> Splits:
    """Splits of a folder in which `count` images are `image`, the others plain."""
    ordinary = saved(Image.fromarray(LEVELS).convert("RGB"))
    images = {f"{'ab'[row % 2]}/{row}.{kind}": image if row < count else ordinary for row in range(120)}
    return split(
        open_source(write_folder(folder, images)),
        calibration=None, seed=0, count=1, draws=1, search=118, test=1, transform=transform,
    )  # fmt: skip


@pytest.mark.parametrize("where", ["folder", "parquet"])
@pytest.mark.parametrize(
    ("array", "kind", "said"),
    [
        (SIXTEEN, "png", "integers of 16 bits, of which 0 to 65,535"),
        (SIXTEEN, "tiff", "integers of 16 bits, of which 0 to 65,535"),
        (SIXTEEN.astype(">u2"), "tiff", "integers of 16 bits, of which 0 to 65,535"),
        (SIXTEEN, "ppm", "integers of 32 bits, of which 0 to 65,535"),
        (SIXTEEN.astype(np.int32), "tiff", "integers of 32 bits, of which 0 to 65,535"),
        (RAMP.astype(np.float32), "tiff", "floats, of which 0 to 1"),
    ],
    ids=lambda value: str(value.dtype) if isinstance(value, np.ndarray) else value[:8],
)
def test_wide_values_are_scaled_and_said_once(
    tmp_path: Path, where: str, array: np.ndarray, kind: str, said: str
) -> None:
    images = [saved(Image.fromarray(array), kind)] * 40
    spec = (
        write_parquet(tmp_path / "some.parquet", images, [0, 1] * 20)
        if where == "parquet"
        else write_folder(tmp_path, {f"{'ab'[row % 2]}/{row}.{kind}": image for row, image in enumerate(images)})
    )
    splits = split(open_source(spec), calibration=None, seed=0, count=4, search=10, test=10)
    assert (splits.search.stored == LEVELS).all()
    (note,) = (note for note in splits.notes if "8 bits" in note)
    assert f"24 of 24 images have {said} are brought to 8 bits" in note
    assert "dark" not in note


@pytest.mark.parametrize(
    ("array", "said"),
    [
        (RAMP * 255, "floats up to 255, where 1 is white: .*--transform white=VALUE"),
        (RAMP - 0.5, "floats from -0.5 to 0.5, of which those below 0"),
        (np.where(RAMP > 0.9, np.nan, RAMP), "floats that are not finite"),
        ((RAMP * 1e6).astype(np.int32), "integers of 32 bits up to 1e\\+06, where 65,535 is white"),
        ((RAMP * 2000 - 1000).astype(np.int32), "integers of 32 bits from -1,000 to 1,000"),
    ],
)
def test_values_that_no_8_bits_stand_for_are_refused_by_name(tmp_path: Path, array: np.ndarray, said: str) -> None:
    wide = array if array.dtype == np.int32 else array.astype(np.float32)
    with pytest.raises(ImagesMistake, match=f"a/0.tiff has {said}"):
        of_many(tmp_path, saved(Image.fromarray(wide), "TIFF"), "tiff")


def test_a_user_says_what_is_white(tmp_path: Path) -> None:
    twelve = saved(Image.fromarray((RAMP * 4095).astype(np.uint16)))
    (note,) = (note for note in of_many(tmp_path, twelve, "png", 120).notes if "dark" in note)
    assert "their greatest value is 4,095" in note
    advised = note.partition("--transform ")[2].replace("VALUE", "4095")
    splits = of_many(tmp_path, twelve, "png", 120, read_settings(None, {"transform": advised}).networks[0].transform)
    assert (splits.search.stored == LEVELS).all()
    assert not any("dark" in note for note in splits.notes)


@pytest.mark.parametrize(
    ("mode", "kind"),
    [
        *((mode, "tiff") for mode in ("1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "LAB")),
        pytest.param("YCbCr", "tiff", marks=pytest.mark.skipif(OLD, reason="Pillow cannot read back what it saves")),
        *((mode, "png") for mode in ("1", "L", "LA", "P", "RGB", "RGBA")),
        *((mode, "jpeg") for mode in ("L", "RGB", "CMYK", "YCbCr")),
        ("RGBA", "webp"),
    ],
)
def test_8_bits_are_those_of_torchvisions_loader(tmp_path: Path, mode: str, kind: str) -> None:
    image = RGBA if mode == "RGBA" else RGBA.convert("RGB").convert(mode)
    spec = write_folder(tmp_path, {f"a/0.{kind}": saved(image, kind)})
    loaded = np.asarray(pil_loader(tmp_path / f"a/0.{kind}"))
    assert (open_source(spec).decode([0], None).stored[0].transpose(1, 2, 0) == loaded).all()


TURNED = Image.Exif()
TURNED[0x0112] = 6


@pytest.mark.parametrize(
    ("image", "kind", "said"),
    [
        (saved(RGBA), "png", "transparency, which is left out"),
        (saved(RGBA.convert("RGB").convert("P"), transparency=0), "png", "transparency, which is left out"),
        (saved(RGBA.convert("RGB"), "JPEG", exif=TURNED), "jpg", "taken as they are stored, though their EXIF"),
        (saved(RGBA, save_all=True, append_images=[RGBA]), "png", "several frames, of which the first"),
        (saved(RGBA.convert("L"), "TIFF", save_all=True, append_images=[RGBA]), "tif", "several frames"),
        (png(struct.pack(">IIBBBBB", 16, 16, 16, 2, 0, 0, 0), bytes(16 * 97)), "png", "16 bits a channel"),
        (b"", "png", "cannot be decoded, first a/0.png: it is no image that Pillow knows"),
        (saved(RGBA.convert("RGB"), "JPEG")[:-100], "jpg", "cannot be decoded, first a/0.jpg: image file is truncated"),
        (png(struct.pack(">IIBBBBB", 10_000, 10_000, 8, 0, 0, 0, 0)), "png", "cannot be decoded, .* exceeds limit"),
        (png(struct.pack(">IIBBBBB", 60_000, 60_000, 8, 0, 0, 0, 0)), "png", "cannot be decoded, .* exceeds limit"),
    ],
    ids=["alpha", "palette", "turned", "animated", "pages", "wide", "empty", "truncated", "large", "bomb"],
)
def test_what_is_lost_is_said(
    tmp_path: Path, recwarn: pytest.WarningsRecorder, image: bytes, kind: str, said: str
) -> None:
    notes = of_many(tmp_path, image, kind).notes
    assert [note for note in notes if re.search(f"1 of 120 images .*{said}", note)], notes
    assert not recwarn.list


def test_an_opaque_channel_and_an_upright_image_are_not_worth_a_word(tmp_path: Path) -> None:
    upright = Image.Exif()
    upright[0x0112] = 1
    opaque = RGBA.convert("RGB").convert("RGBA")
    notes = of_many(tmp_path, saved(opaque, exif=upright), "png").notes
    assert [note.partition(": ")[2] for note in notes] == ["class 0 is a, 1 is b"]


def test_grey_where_white_is_zero_is_turned_round(tmp_path: Path) -> None:
    content = bytearray(saved(Image.fromarray(SIXTEEN), "TIFF"))
    place = content.index(struct.pack("<HHI", 262, 3, 1))
    content[place + 8] = 0
    images = open_source(write_folder(tmp_path, {"a/0.tif": bytes(content)})).decode([0], None)
    assert (images.stored == 255 - LEVELS).all()
