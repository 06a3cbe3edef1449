"""The options of `lumina` that are about LoRAs."""

from pathlib import Path
from typing import Annotated, NamedTuple

import typer

MAX_SCALE = 10.0


class MergedLora(NamedTuple):
    """A LoRA file to be merged into the weights, and the factor of its change."""

    path: Path
    scale: float

    def __str__(self) -> str:
        """As `--lora` takes it."""
        return f"{self.path}:{self.scale!r}"


def merged_lora(text: str) -> MergedLora:
    """Read ``FILE[:SCALE]``; a colon inside an existing file's name is part of the name.

    Raises typer.BadParameter with one sentence.
    """
    head, colon, tail = text.rpartition(":")
    lora = MergedLora(Path(text), 1.0)
    if colon and not lora.path.exists():
        try:
            lora = MergedLora(Path(head), float(tail))
        except ValueError:
            raise typer.BadParameter(f"{text!r} must be FILE or FILE:SCALE") from None
    if not -MAX_SCALE <= lora.scale <= MAX_SCALE:
        raise typer.BadParameter(
            f"scale {lora.scale:g} must be a number from -{MAX_SCALE:g} to {MAX_SCALE:g}"
        )
    if not lora.path.is_file():
        raise typer.BadParameter(f"{lora.path}: there is no such file")
    return lora


Merged = Annotated[
    list[MergedLora] | None,
    typer.Option(
        "--lora",
        parser=merged_lora,
        metavar="FILE[:SCALE]",
        help="LoRA to merge into the weights; may be given several times.",
        show_default=False,
    ),
]
LoraDir = Annotated[
    Path | None,
    typer.Option(help="Folder of LoRA files that requests may name.", show_default=False),
]
