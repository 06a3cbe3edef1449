"""The options of `lumina` that say how a worker is made faster (docs/performance.md)."""

from typing import Annotated

import typer

Compile = Annotated[
    str | None,
    typer.Option(
        "--compile",
        metavar="off|blocks|full",
        help="torch.compile of the transformer blocks.",
        show_default="blocks on a GPU, off on a CPU",
    ),
]
Quantize = Annotated[
    str | None,
    typer.Option(
        "--quantize",
        metavar="none|fp8",
        help="Matrix products in fp8, on GPUs that have it.",
        show_default="none",
    ),
]
