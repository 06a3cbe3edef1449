"""Aspect buckets: the sizes pictures are trained at, and how a picture is brought to one.

The list is that of the released training code (Lumina-Image-2.0): about equal areas, aspect ratios
up to 4, and sides whose latents, pooled four times, can still be cut into patches.
"""

from collections.abc import Sequence

from PIL import Image

SIDE = 16  # pixels of an image token's side: patch 2, autoencoder 8
MAX_ASPECT = 4.0
SizePx = tuple[int, int]  # width, height


def aspect_buckets(resolution: int) -> list[SizePx]:
    """Sizes (width, height) in pixels of about ``resolution`` squared, widest first.

    Walks down the staircase of the largest grids of at most ``(resolution / 16) ** 2`` tokens. At
    1024 these are 51.

    Raises:
        ValueError: when the resolution is no multiple of 64.
    """
    if resolution < 64 or resolution % 64:
        raise ValueError(f"resolution {resolution} must be a multiple of 64, from 64 up")
    tokens = (resolution // SIDE) ** 2
    columns, rows = tokens, 1
    sizes = []
    while columns:
        aspect = max(columns, rows) / min(columns, rows)
        # floor(side / 32) is even for 64 k and 64 k + 16: a pooled latent has whole patches.
        if aspect <= MAX_ASPECT and not (columns // 2) % 2 and not (rows // 2) % 2:
            sizes.append((columns * SIDE, rows * SIDE))
        if columns * (rows + 1) <= tokens:
            rows += 1
        else:
            columns -= 1
    return sizes


def nearest_bucket(width: int, height: int, buckets: Sequence[SizePx]) -> SizePx:
    """The bucket that keeps most of a picture: whose aspect ratio is nearest, by quotient."""
    aspect = width / height

    def agreement(size: SizePx) -> float:
        quotient = size[0] / size[1] / aspect
        return min(quotient, 1 / quotient)

    return max(buckets, key=agreement)


def fit(image: Image.Image, size: SizePx) -> Image.Image:
    """An RGB picture scaled to cover ``size`` and cropped in the middle.

    Halved by box filter while it is twice as large or more, then bicubic; transparency becomes
    white.

    Raises:
        ValueError: for a colour mode that has no plain meaning in RGB.
    """
    image = to_rgb(image)
    while min(image.width / size[0], image.height / size[1]) >= 2:
        half = (image.width // 2, image.height // 2)
        image = image.resize(half, Image.Resampling.BOX)
    scale = max(size[0] / image.width, size[1] / image.height)
    covering = (max(size[0], round(image.width * scale)), max(size[1], round(image.height * scale)))
    image = image.resize(covering, Image.Resampling.BICUBIC)
    left, top = (covering[0] - size[0]) // 2, (covering[1] - size[1]) // 2
    return image.crop((left, top, left + size[0], top + size[1]))


def to_rgb(image: Image.Image) -> Image.Image:
    """The picture in RGB, on white where it is transparent."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    if image.mode in ("RGBA", "LA"):
        image = image.convert("RGBA")
        ground = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(ground, image).convert("RGB")
    if image.mode not in ("RGB", "L", "P"):
        raise ValueError(f"colour mode {image.mode} is not supported; RGB, RGBA, L, LA and P are")
    return image.convert("RGB")
