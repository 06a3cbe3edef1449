"""What a picture says about its making, for `lumina inspect`."""

import json
from pathlib import Path


def picture_facts(path: Path) -> list[tuple[str, str]]:
    """The generation parameters in a picture's text chunk, as lines.

    Raises ValueError when there are none, or no picture.
    """
    from PIL import Image, UnidentifiedImageError

    from server.protocol import PNG_TEXT_KEY

    try:
        with Image.open(path) as picture:
            facts = [("picture", f"{picture.format}, {picture.width}x{picture.height}")]
            text = picture.info.get(PNG_TEXT_KEY)
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError):
        raise ValueError(f"{path}: not a picture that can be read") from None
    if not isinstance(text, str):
        raise ValueError(f"{path}: this picture does not say how it was made")
    try:
        parameters = json.loads(text)
        facts += [(name, str(value)) for name, value in parameters.items()]
    except (ValueError, AttributeError):
        facts.append((PNG_TEXT_KEY, text))
    return facts
