"""What `lumina generate` does: one picture, drawn in this process or by a server."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from server.field_options import fields_of, request_of
from server.misuse import MisuseError
from server.progress import progress_bar

if TYPE_CHECKING:
    from server.config import Settings
    from server.protocol import OutputFormat

FORMATS: "dict[str, OutputFormat]" = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}

NoParameters = Annotated[
    bool, typer.Option("--no-parameters", help="The file shall not say how it was made.")
]
ServerUrl = Annotated[
    str | None,
    typer.Option(
        help="Have this server draw it; --model names one of its models.",
        show_default="in this process",
    ),
]
ApiKey = Annotated[
    str | None, typer.Option(envvar="LUMINA_API_KEY", help="For --url.", show_default=False)
]


@dataclass(frozen=True)
class Wish:
    """A picture as the command line asks for it.

    Attributes:
        prompt: what to draw.
        output: the file to write.
        options: fields that have an option of their own; None where it was not given.
        assignments: ``FIELD=VALUE`` texts.
        embed_parameters: whether the file says how it was made.
    """

    prompt: str
    output: Path
    options: dict[str, Any]
    assignments: list[str] = field(default_factory=list)
    embed_parameters: bool = True

    @property
    def image_format(self) -> "OutputFormat":
        """The format that the file's name asks for; raises MisuseError for any other."""
        image_format = FORMATS.get(self.output.suffix.lower())
        if image_format is None:
            raise MisuseError(f"--output {self.output} must end in {', '.join(FORMATS)}")
        if not self.output.parent.is_dir():
            raise MisuseError(f"--output {self.output}: there is no folder {self.output.parent}")
        return image_format


def draw_here(
    wish: Wish, folder: Path, settings: "Settings", merged_loras: Sequence[tuple[Path, float]]
) -> None:
    """Draw in this process and write the file; raises MisuseError, or ValueError for the model."""
    image_format = wish.image_format
    try:
        request = request_of(wish.prompt, wish.assignments, wish.options)
    except ValueError as error:
        raise MisuseError(str(error)) from None
    from server.worker.content_credentials import open_credentials
    from server.worker.local import Drawing

    try:
        credentials = open_credentials(settings.c2pa_cert, settings.c2pa_key)
    except ValueError as error:
        raise MisuseError(str(error)) from None
    drawing = Drawing(
        folder,
        settings.precision,
        merged_loras=merged_loras,
        lora_dir=settings.lora_dir,
        credentials=credentials,
    )
    try:
        drawing.prepare(request)
    except ValueError as error:
        raise MisuseError(str(error)) from None
    with progress_bar(drawing.state.num_steps) as bar:
        data = drawing.draw(image_format, bar.advance, embed=wish.embed_parameters)
    _write(wish.output, data, drawing.state.warnings, drawing.summary)


def draw_there(wish: Wish, url: str, api_key: str | None) -> None:
    """Have a server draw and write the file; raises MisuseError or ServiceError. No torch."""
    from server.remote import RefusedInput, draw_remotely, summary

    given: dict[str, Any] = {"output_format": wish.image_format}
    if not wish.embed_parameters:
        given["embed_parameters"] = False
    try:
        fields = fields_of(wish.assignments, wish.options | given)
        data, job = draw_remotely(url, api_key, wish.prompt, fields)
    except RefusedInput as error:
        raise MisuseError(f"{url}: {error}") from None
    except ValueError as error:
        raise MisuseError(str(error)) from None
    _write(wish.output, data, job.warnings, summary(job))


def _write(output: Path, data: bytes, warnings: Sequence[str], summary: str) -> None:
    output.write_bytes(data)
    for warning in warnings:
        print(f"lumina: warning: {warning}", file=sys.stderr)
    print(f"{output}: {summary}")
