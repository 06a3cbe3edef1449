"""Picture files and what they say of their making: written here, read here. Imports no torch.

A PNG carries its parameters as JSON in a text chunk; JPEG and WebP, which have none, carry the same
text as the EXIF user comment, where picture tools look for it.
"""

import io
import json
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from PIL import ExifTags, Image, PngImagePlugin

from server.protocol import PNG_TEXT_KEY, OutputFormat

JPEG_QUALITY = 90
WEBP_QUALITY = 90
MAX_EXIF_BYTES = 65_000  # a JPEG segment holds 65,533 bytes, its headers among them

_UNICODE = b"UNICODE\0"  # EXIF 2.32, 4.6.5: the character code of a user comment


def encode_image(
    image: Image.Image,
    output_format: OutputFormat,
    quality: int | None,
    parameters: Mapping[str, Any] | None,
) -> bytes:
    """Return the file of a picture, which carries `parameters` as JSON where `carries` says so.

    Equal arguments give equal bytes. `quality` (1..100) is for jpeg and webp.
    """
    buffer = io.BytesIO()
    text = _text(parameters) if parameters is not None else None
    if output_format == "png":
        info = PngImagePlugin.PngInfo()
        if text is not None:
            info.add_itxt(PNG_TEXT_KEY, text)
        image.save(buffer, "PNG", pnginfo=info)
        return buffer.getvalue()
    exif = _exif(text) if text is not None and carries(output_format, parameters) else b""
    if output_format == "jpeg":
        image.convert("RGB").save(buffer, "JPEG", quality=quality or JPEG_QUALITY, exif=exif)
    else:
        image.save(buffer, "WEBP", quality=quality or WEBP_QUALITY, exif=exif)
    return buffer.getvalue()


def carries(output_format: OutputFormat, parameters: Mapping[str, Any] | None) -> bool:
    """Whether a file of this format has room for the parameters (a PNG always has)."""
    if parameters is None:
        return False
    return output_format == "png" or len(_exif(_text(parameters))) <= MAX_EXIF_BYTES


def parameters_of(request: Any, model_name: str, model_hash: str, index: int) -> dict[str, Any]:
    """What made picture `index` of a resolved request: settings, model, seed; no id, no time."""
    settings = asdict(request)
    del settings["num_images"]
    given = {name: value for name, value in settings.items() if value is not None}
    return {**given, "seed": given["seed"] + index, "model": model_name, "model_hash": model_hash}


def read_parameters(picture: Image.Image) -> str | None:
    """Return the text in which an opened picture says how it was made, usually JSON, or None."""
    text = picture.info.get(PNG_TEXT_KEY)
    if isinstance(text, str):
        return str(text)
    comment = picture.getexif().get_ifd(ExifTags.IFD.Exif).get(ExifTags.Base.UserComment)
    if isinstance(comment, bytes) and comment.startswith(_UNICODE):
        return comment.removeprefix(_UNICODE).decode("utf-16-be", "replace")
    return None


def _text(parameters: Mapping[str, Any]) -> str:
    return json.dumps(parameters, ensure_ascii=False, sort_keys=True)


def _exif(text: str) -> bytes:
    exif = Image.Exif()
    exif.get_ifd(ExifTags.IFD.Exif)[ExifTags.Base.UserComment] = _UNICODE + text.encode("utf-16-be")
    return exif.tobytes()
