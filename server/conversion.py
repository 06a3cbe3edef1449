"""`lumina convert`: its options, its progress bar, and the words in which it reports."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from model.convert import Report
    from model.weight_source import Source


class Target(StrEnum):
    """What to write."""

    FOLDER = "folder"
    OFFICIAL = "official"


class Precision(StrEnum):
    """Number formats of a conversion's result."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


def _part(words: str) -> typer.models.OptionInfo:
    option: typer.models.OptionInfo = typer.Option(help=words, show_default=False)
    return option


def convert(
    source: Annotated[
        Path, typer.Argument(help="Official or ComfyUI file, or a diffusers transformer folder.")
    ],
    target: Annotated[
        Path, typer.Argument(help="The checkpoint folder to make (a file with --to official).")
    ],
    vae: Annotated[Path | None, _part("Folder of the autoencoder to copy.")] = None,
    text_encoder: Annotated[Path | None, _part("Folder of Gemma-2 to copy.")] = None,
    tokenizer: Annotated[Path | None, _part("Folder of its tokenizer to copy.")] = None,
    like: Annotated[
        Path | None, _part("Checkpoint folder that supplies configs and parts not given.")
    ] = None,
    dtype: Annotated[
        Precision | None,
        typer.Option(help="Of the transformer's weights.", show_default="as stored"),
    ] = None,
    to: Annotated[Target, typer.Option(help="A checkpoint folder, or one file.")] = Target.FOLDER,
) -> int:
    """Make a checkpoint folder of weights in another format, or the other way round."""
    folders = {"vae": vae, "text_encoder": text_encoder, "tokenizer": tokenizer}
    parts = {name: folder for name, folder in folders.items() if folder is not None}
    if to is Target.OFFICIAL and parts:
        raise typer.BadParameter("--to official writes the transformer alone: give no other part")
    if to is Target.OFFICIAL and target.suffix != ".safetensors":
        raise typer.BadParameter(f"{target}: --to official makes a file that ends in .safetensors")
    if not source.exists():
        raise typer.BadParameter(f"{source}: there is no such file or folder")
    if like is not None and not like.is_dir():
        raise typer.BadParameter(f"--like {like}: there is no such checkpoint folder")
    import torch

    from model.convert import to_folder, to_official

    number = getattr(torch, dtype.value) if dtype else None
    with _bytes_bar() as (start, advance):
        if to is Target.OFFICIAL:
            report = to_official(
                source, target, like=like, dtype=number, on_start=start, on_bytes=advance
            )
        else:
            report = to_folder(
                source,
                target,
                parts=parts,
                like=like,
                dtype=number,
                on_start=start,
                on_bytes=advance,
            )
    _tell(report, target)
    return 0


def source_facts(source: "Source") -> list[tuple[str, str]]:
    """What a transformer's file or folder is, as (name, value) lines."""
    config = source.config
    prefix = f", after {source.prefix!r}" if source.prefix else ""
    facts = [
        ("transformer", f"Lumina-Image 2.0, {source.size or 'no named size'}"),
        ("weights", f"{source.num_parameters / 1e6:.2f} million, {' and '.join(source.dtypes)}"),
        ("names", f"{source.dialect.name}{prefix}"),
        (
            "network",
            f"{config.num_layers} layers and 2 x {config.num_refiner_layers} refiners, hidden size "
            f"{config.hidden_size}, {config.num_attention_heads} heads ({config.num_kv_heads} for "
            f"keys and values), feed-forward {config.ffn_dim}, {config.in_channels} latent "
            f"channels, text features {config.cap_feat_dim}",
        ),
    ]
    if source.assumed:
        values = ", ".join(
            f"{name} {list(value) if isinstance(value, tuple) else value}"
            for name, value in source.assumed.items()
        )
        origin = f"as in the {source.size} model" if source.size else "by the family's rules"
        facts.append(("ASSUMED", f"{values} ({origin}: no weight shows them)"))
    if source.ignored:
        groups = ", ".join(f"{group} ({n})" for group, n in sorted(source.ignored.items()))
        facts.append(("ignored", groups))
    return facts


def print_facts(facts: list[tuple[str, str]]) -> None:
    """Print (name, value) lines, values aligned."""
    width = max(len(name) for name, _ in facts)
    for name, value in facts:
        print(f"{name:<{width}}  {value}")


def _tell(report: "Report", target: Path) -> None:
    print_facts([("written", str(target)), *source_facts(report.source)])
    if report.missing:
        folders = ", ".join(f"{name}/" for name in report.missing)
        print(f"still missing: {folders}: the checkpoint can be loaded once they are in {target}")


@contextmanager
def _bytes_bar() -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """Yield functions that hear of the total and of every piece; shown on a terminal only."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = TextColumn("converting"), BarColumn(), DownloadColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("converting", total=None)
        yield (
            lambda total: progress.update(task, total=total),
            lambda count: progress.advance(task, count),
        )
