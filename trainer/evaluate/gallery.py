"""The README's gallery: ``python -m trainer.evaluate.gallery checkpoints/demo docs/images``."""

import sys
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from model import GenerationRequest, load_pipeline

PROMPTS = (
    "a red circle above a blue square",
    "three yellow stars",
    "a green triangle to the left of a purple cross",
    "a large orange diamond on a black background",
    "two cyan squares and a red star",
    "a pink circle on a striped background",
    "a white star below a yellow circle, navy background",
    "four small blue triangles on a cream background",
)
COLUMNS = 4
CELL = 192
CAPTION_HEIGHT = 34
MARGIN = 10
SEED = 1


def draw_gallery(checkpoint: Path, size: int) -> Image.Image:
    """One picture for each prompt at the checkpoint's default settings, captioned."""
    pipeline = load_pipeline(checkpoint)
    requests = [GenerationRequest(p, seed=SEED, width=size, height=size) for p in PROMPTS]
    pictures = [images[0] for images in pipeline.generate(requests)]
    rows = -(-len(pictures) // COLUMNS)
    step_x, step_y = CELL + MARGIN, CELL + CAPTION_HEIGHT + MARGIN
    sheet = Image.new("RGB", (COLUMNS * step_x + MARGIN, rows * step_y + MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=13)
    for place, (picture, prompt) in enumerate(zip(pictures, PROMPTS, strict=True)):
        x = MARGIN + place % COLUMNS * step_x
        y = MARGIN + place // COLUMNS * step_y
        sheet.paste(picture.resize((CELL, CELL), Image.Resampling.LANCZOS), (x, y))
        draw.multiline_text((x, y + CELL + 3), _wrapped(prompt, font), fill="#222", font=font)
    return sheet


def _wrapped(text: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont) -> str:
    """Break a prompt into lines no wider than a cell."""
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if font.getlength(longer) > CELL:
            lines.append(word)
        else:
            lines[-1] = longer
    return "\n".join(lines)


if __name__ == "__main__":
    checkpoint, folder = Path(sys.argv[1]), Path(sys.argv[2])
    folder.mkdir(parents=True, exist_ok=True)
    draw_gallery(checkpoint, int(sys.argv[3]) if len(sys.argv) > 3 else 128).save(
        folder / "gallery.png", optimize=True
    )
