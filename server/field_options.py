"""`lumina generate --set FIELD=VALUE`: fields of a request that have no option of their own."""

import json
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from model.request import GenerationRequest

# Fields that are lists or objects, each as it is to be written.
_JSON_FIELDS = {
    "sigmas": "[1, 0.7, 0.3]",
    "loras": '[{"name": "ink", "scale": 0.8}]',
    "panel": '{"position": "lower half", "content": "depth map"}',
}
_ELSEWHERE = {
    "prompt": "the prompt stands by itself, before or after the options",
    "num_images": "this command draws one picture; repeat it with the seed that follows",
}


_OWN = ("seed", "preset", "loras")  # of requests, never of checkpoints


def request_of(prompt: str, assignments: list[str], options: dict[str, Any]) -> "GenerationRequest":
    """The request that a command line describes.

    Args:
        prompt: what to draw.
        assignments: ``FIELD=VALUE`` texts.
        options: what other options said, by field name; None where they said nothing.

    Raises:
        ValueError: one sentence naming the field.
    """
    from model.request import GenerationRequest, check_settings

    fields = fields_of(assignments, options)
    check_settings({name: value for name, value in fields.items() if name not in _OWN})
    return GenerationRequest(prompt, **fields)


def fields_of(assignments: list[str], options: dict[str, Any]) -> dict[str, Any]:
    """The fields of ``FIELD=VALUE`` texts, values as JSON or else as text, beside named options.

    Raises ValueError with one sentence; what a field may be is for others to check.
    """
    settings = {name: value for name, value in options.items() if value is not None}
    for assignment in assignments:
        name, equals, text = assignment.partition("=")
        if not equals:
            raise ValueError(f"--set {assignment!r} must be FIELD=VALUE")
        if name in _ELSEWHERE:
            raise ValueError(f"--set {name}: {_ELSEWHERE[name]}")
        if name in settings:
            raise ValueError(f"--set {name}: this field is given twice")
        try:
            settings[name] = json.loads(text)
        except ValueError:
            if name in _JSON_FIELDS:
                raise ValueError(
                    f"--set {assignment!r} must be JSON: write --set '{name}={_JSON_FIELDS[name]}'"
                ) from None
            settings[name] = text
    return settings
