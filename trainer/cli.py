"""The ``trainer`` command line: thin, every command calls one function."""

import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import Abort, TyperException

if TYPE_CHECKING:
    from trainer.config import Recipe

app = typer.Typer(
    help="Make the checkpoints that lumina-serve serves.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
data_app = typer.Typer(help="Build data sets.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class MisuseError(ValueError):
    """Options that cannot be: the command ends with exit code 2."""


Out = Annotated[Path, typer.Option("--out", help="Folder to write.")]


@data_app.command("build")
def data_build(
    name: Annotated[str, typer.Argument(help="Which world; 'demo' is the only one.")],
    out: Out,
    num: Annotated[int, typer.Option("--num", min=1, help="Number of scenes.")],
    seed: Annotated[int, typer.Option("--seed", help="Same seed, same data.")] = 0,
    size: Annotated[int, typer.Option("--size", help="Side of the pictures in pixels.")] = 64,
) -> None:
    """Render scenes to PNG files and write their captions to records.jsonl."""
    if name != "demo":
        raise MisuseError(f"data set {name!r} is unknown; 'demo' is the only one")
    from trainer.demo.dataset import build

    build(out, num, seed, sizes=((size, size),))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a YAML file.")],
    out: Annotated[
        Path | None, typer.Option("--out", help="Run folder [runs/NAME, runs/NAME-smoke].")
    ] = None,
    smoke: Annotated[
        bool, typer.Option("--smoke", help="A few steps of every stage on a tiny model.")
    ] = False,
    init: Annotated[
        Path | None, typer.Option("--init", help="Start from this exported checkpoint.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Override: key.path=value.")
    ] = None,
    plan: Annotated[
        bool,
        typer.Option("--plan", help="Print memory per GPU and time; train nothing."),
    ] = False,
    resume: Annotated[
        str,
        typer.Option(
            "--resume",
            help="auto: go on where --out stopped; never: refuse; DIR: go on with this run, or "
            "from this checkpoint of it (newer ones are removed).",
        ),
    ] = "auto",
) -> None:
    """Train a recipe's stages in order; a run that was stopped goes on where it was.

    Several processes: ``torchrun --nproc-per-node N -m trainer train …``.
    """
    from trainer.config import load_recipe

    try:
        loaded = load_recipe(recipe, settings)
    except ValueError as error:
        raise MisuseError(str(error)) from None
    from trainer.distributed import close_world, init_world
    from trainer.stages.run import run_recipe
    from trainer.stages.smoke import shrink

    if smoke:
        loaded = shrink(loaded)
    if plan:
        _print_plan(loaded)
        return
    folder = out or Path("runs") / (f"{loaded.name}-smoke" if smoke else loaded.name)
    if resume not in ("auto", "never"):
        folder = _resumed(Path(resume), out)
    if resume == "never" and (folder / "recipe.yaml").is_file():
        raise MisuseError(f"--out {str(folder)!r} already holds a run")
    world = init_world()
    try:
        run_recipe(loaded, folder, world, init)
    finally:
        close_world()
    if world.is_main:
        typer.echo(f"done: {folder}")


def _print_plan(recipe: "Recipe") -> None:
    from rich.console import Console

    from trainer.plan import tables

    for table in tables(recipe):
        Console().print(table)


def _resumed(place: Path, out: Path | None) -> Path:
    """The run folder that ``--resume DIR`` means."""
    from trainer.checkpoint import rewind

    if not place.is_dir():
        raise MisuseError(
            f"--resume {str(place)!r} is not allowed; give auto, never, or a folder that is there"
        )
    if (place / "recipe.yaml").is_file():
        run = place
    else:
        run = place.resolve().parent.parent.parent
        if out is None or out.resolve() == run:
            run = rewind(place.resolve())
    if out is not None and out.resolve() != run.resolve():
        raise MisuseError(f"--resume {str(place)!r} is of another run than --out {str(out)!r}")
    return run


@app.command()
def export(
    run: Annotated[Path, typer.Argument(help="A run folder of `trainer train`.")],
    out: Out,
    init: Annotated[
        Path | None, typer.Option("--init", help="The checkpoint the run started from.")
    ] = None,
) -> None:
    """Write a run's averaged weights as a checkpoint folder that servers and diffusers load."""
    from trainer.export import export_run

    info = export_run(run, out, init)
    stages = ", ".join(f"{name} {steps} steps" for name, steps in info["stages"].items())
    typer.echo(f"wrote {out} ({info['parameters'] / 1e6:.1f} M parameters; {stages})")


@app.command()
def evaluate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    suite: Annotated[str, typer.Option("--suite", help="'demo' is the only one.")] = "demo",
    size: Annotated[
        list[int] | None,
        typer.Option("--size", help="Side in pixels, repeatable [the checkpoint's own]."),
    ] = None,
    limit: Annotated[
        int | None, typer.Option("--limit", min=1, help="At most this many prompts in all.")
    ] = None,
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder for demo.json and demo.png.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", help="Of the first picture.")] = 0,
    preset: Annotated[str | None, typer.Option("--preset", help="Generation preset.")] = None,
    card: Annotated[
        bool, typer.Option("--card", help="Write the scores into the checkpoint's model card.")
    ] = False,
) -> None:
    """Draw the suite's held-out prompts, judge every picture, print the table."""
    if suite != "demo":
        raise MisuseError(f"--suite {suite!r} is unknown; 'demo' is the only one")
    from model.checkpoint import read_json
    from trainer.evaluate.card import write_card
    from trainer.evaluate.demo import run_demo_suite

    if not size:
        config = read_json(checkpoint / "transformer" / "config.json")
        generation = checkpoint / "generation_config.json"
        defaults = read_json(generation).get("defaults", {}) if generation.is_file() else {}
        size = [int(defaults.get("width", config.get("sample_size", 8) * 8))]
    settings = {"preset": preset} if preset else None
    reports = [
        run_demo_suite(
            checkpoint,
            size=side,
            limit=limit,
            out_dir=out / str(side) if out else None,
            seed=seed,
            settings=settings,
        )
        for side in size
    ]
    if card:
        write_card(checkpoint, reports)


@app.command()
def calibrate(
    checkpoint: Annotated[Path, typer.Argument(help="A checkpoint folder.")],
    per_task: Annotated[
        int, typer.Option("--per-task", min=1, max=50, help="Prompts measured of each task.")
    ] = 8,
) -> None:
    """Measure which steps can be skipped; writes teacache.json and rewrites manifest.json."""
    if not checkpoint.is_dir():
        raise MisuseError(f"{str(checkpoint)!r}: there is no such checkpoint folder")
    from rich.console import Console

    from trainer.calibrate import calibrate as run
    from trainer.calibrate import table

    content = run(checkpoint, per_task=per_task)
    Console().print(table(content))
    typer.echo(f"wrote {checkpoint / 'teacache.json'}")


def _fail(message: str, code: int) -> int:
    print(f"trainer: {' '.join(message.split())}", file=sys.stderr)
    return code


def main(argv: list[str] | None = None) -> int:
    """Run one command and return the exit code: 0 done, 1 failed, 2 misuse; errors are one line.

    With ``--debug`` among the words the traceback is shown.
    """
    # xformers would greet every command with what its CUDA build lacks here.
    logging.getLogger("xformers").setLevel(logging.ERROR)
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    words = [word for word in argv if word != "--debug"] or ["--help"]
    try:
        result = app(args=words, prog_name="trainer", standalone_mode=False)
    except TyperException as error:
        return _fail(error.format_message(), 2)
    except (KeyboardInterrupt, Abort):
        return _fail("interrupted; run the same command again to go on", 130)
    except Exception as error:
        if debug:
            raise
        if isinstance(error, ValueError | OSError):
            return _fail(str(error), 2 if isinstance(error, MisuseError) else 1)
        return _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    sys.exit(main())
