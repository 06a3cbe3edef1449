"""A sheet of evaluated pictures: prompt below, framed green where right and red where wrong."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

Cell = tuple[Image.Image, str, bool]  # picture, prompt, whether it is right

_FRAME = 4
_TEXT_LINES = 3
_LINE_HEIGHT = 12
_MIN_CELL = 128
_RIGHT, _WRONG, _PAPER, _INK = (40, 160, 70), (210, 50, 50), (255, 255, 255), (30, 30, 30)


def image_grid(cells: Sequence[Cell], columns: int = 8) -> Image.Image:
    """Lay out (picture, prompt, correct) cells in rows; small pictures are enlarged, unsmoothed."""
    if not cells:
        raise ValueError("cells is empty; a grid needs at least one picture")
    scale = max(1, round(_MIN_CELL / min(cells[0][0].size)))
    width = max(picture.width for picture, _, _ in cells) * scale + 2 * _FRAME
    height = max(picture.height for picture, _, _ in cells) * scale + 2 * _FRAME
    text_height = _TEXT_LINES * _LINE_HEIGHT + 4
    columns = min(columns, len(cells))
    rows = -(-len(cells) // columns)
    sheet = Image.new("RGB", (columns * (width + 4), rows * (height + text_height)), _PAPER)
    for i, (picture, prompt, correct) in enumerate(cells):
        left, top = i % columns * (width + 4), i // columns * (height + text_height)
        sheet.paste(_framed(picture, scale, correct), (left, top))
        _write(sheet, prompt, left, top + height, width)
    return sheet


def _framed(picture: Image.Image, scale: int, correct: bool) -> Image.Image:
    width, height = picture.width * scale, picture.height * scale
    framed = Image.new(
        "RGB", (width + 2 * _FRAME, height + 2 * _FRAME), _RIGHT if correct else _WRONG
    )
    framed.paste(picture.resize((width, height), Image.Resampling.NEAREST), (_FRAME, _FRAME))
    return framed


def _write(sheet: Image.Image, prompt: str, left: int, top: int, width: int) -> None:
    font = ImageFont.load_default(size=10)
    letters = max(8, int(width / 5.2))
    lines = textwrap.wrap(prompt, letters, max_lines=_TEXT_LINES, placeholder=" ...")
    draw = ImageDraw.Draw(sheet)
    for i, line in enumerate(lines):
        draw.text((left + 2, top + i * _LINE_HEIGHT), line, fill=_INK, font=font)
