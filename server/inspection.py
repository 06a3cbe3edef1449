"""What a picture says about its making, for `lumina inspect`."""

import json
from pathlib import Path


def picture_facts(path: Path) -> list[tuple[str, str]]:
    """The generation parameters and the C2PA manifest in a picture file, as lines.

    Raises ValueError when there are neither, or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    from server.worker.content_credentials import credential_facts
    from server.worker.picture_file import read_parameters

    wrong = UnidentifiedImageError, OSError, ValueError, SyntaxError, Image.DecompressionBombError
    try:
        with Image.open(path) as picture:
            facts = [("picture", f"{picture.format}, {picture.width}x{picture.height}")]
            text = read_parameters(picture)
    except wrong:
        raise ValueError(f"{path}: not a picture that can be read") from None
    credentials = credential_facts(path)
    if text is None and not credentials:
        raise ValueError(f"{path}: this picture does not say how it was made")
    return [*facts, *_parameter_lines(text), *credentials]


def _parameter_lines(text: str | None) -> list[tuple[str, str]]:
    if text is None:
        return [("parameters", "none")]
    try:
        return [(name, str(value)) for name, value in json.loads(text).items()]
    except (ValueError, AttributeError):  # another program's words
        return [("parameters", text)]
