"""The `lumina` command. Thin: it reads options, checks them, and calls what does the work.

Heavy imports wait until a command runs: `lumina --help` is quick and `lumina api` has no torch.
Exit codes: 0 done, 1 failed, 2 misuse. Errors are one line on stderr, a traceback with `--debug`.
"""

import logging
import sys
from contextlib import contextmanager
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import Abort, TyperException

from server.conversion import convert, print_facts, source_facts
from server.field_options import request_of
from server.inspection import picture_facts
from server.lora_options import LoraDir, Merged
from server.operate import dead_app, epoch_app
from server.speed_options import Compile, Quantize

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from server.config import Settings
    from server.protocol import OutputFormat

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # the last four only to refuse them
FORMATS: "dict[str, OutputFormat]" = {
    ".png": "png",
    ".jpg": "jpeg",
    ".jpeg": "jpeg",
    ".webp": "webp",
}

app = typer.Typer(
    name="lumina",
    help="Text to image with the Lumina-Image 2.0 family.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


app.add_typer(dead_app, name="dead")
app.add_typer(epoch_app, name="epoch")


class MisuseError(Exception):
    """Options that cannot be: the command ends with exit code 2."""


Model = Annotated[
    Path | None,
    typer.Option("--model", help="Checkpoint folder.", show_default="the bundled demo"),
]
RedisUrl = Annotated[
    str | None,
    typer.Option(
        help="Redis to use, as redis://, rediss://, unix:// or sentinel://.", show_default=False
    ),
]
Precision = Annotated[
    str | None,
    typer.Option(help="auto, fp32, bf16 or mixed.", show_default="auto: fp32, or mixed on a GPU"),
]
Host = Annotated[str, typer.Option(help="Address to listen on.")]
Port = Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on; 0: any free one.")]
Insecure = Annotated[
    bool, typer.Option("--insecure", help="Serve other machines too, without API keys.")
]


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"lumina-serve {metadata.version('lumina-serve')}")
        raise typer.Exit


@app.callback()
def _common(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (any place).")] = False,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True)
    ] = False,
) -> None:
    pass


@app.command()
def serve(
    model: Model = None,
    redis_url: RedisUrl = None,
    workers: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Worker processes.", show_default="one per GPU, or one"),
    ] = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    data_dir: Annotated[
        Path | None, typer.Option(help="Where jobs and pictures live.", show_default="data")
    ] = None,
    insecure: Insecure = False,
    precision: Precision = None,
    lora: Merged = None,
    lora_dir: LoraDir = None,
    compile: Compile = None,
    quantize: Quantize = None,
) -> int:
    """Run everything on this machine: Redis, workers, the API and its page."""
    folder = _checkpoint_folder(model)
    _check_host(host, insecure)
    work = {"precision": precision, "compile": compile, "quantize": quantize}
    settings = _settings(redis_url=redis_url, data_dir=data_dir, lora_dir=lora_dir, **work)
    from server.embedded import run_service

    return run_service(
        settings,
        folder,
        workers=workers,
        host=host,
        port=port,
        insecure=insecure,
        own_redis=redis_url is None,
        worker_options=[word for each in lora or () for word in ("--lora", str(each))],
    )


@app.command()
def api(
    redis_url: RedisUrl = None,
    host: Host = "127.0.0.1",
    port: Port = 8000,
    insecure: Insecure = False,
    needs_worker: Annotated[
        bool, typer.Option("--needs-model", help="Be ready only once a model is loaded.")
    ] = False,
) -> int:
    """Run the HTTP API alone."""
    _check_host(host, insecure)
    settings = _settings(redis_url=redis_url)
    from server.api.main import run_api

    return run_api(settings, host=host, port=port, insecure=insecure, needs_worker=needs_worker)


@app.command()
def worker(
    redis_url: RedisUrl = None,
    model: Model = None,
    pool: Annotated[str, typer.Option(help="The pool of jobs to take from.")] = "default",
    drain_s: Annotated[
        float | None,
        typer.Option(min=0, help="Seconds to finish work after SIGTERM.", show_default="25"),
    ] = None,
    precision: Precision = None,
    lora: Merged = None,
    lora_dir: LoraDir = None,
    compile: Compile = None,
    quantize: Quantize = None,
    token_fd: Annotated[int | None, typer.Option(hidden=True)] = None,
) -> int:
    """Run one worker: take jobs from Redis and draw their pictures."""
    from server.protocol import is_name

    folder = _checkpoint_folder(model)
    if not is_name(pool):
        raise MisuseError(f"--pool {pool!r} must be 1 to 64 letters, digits, dots and dashes")
    work = {"precision": precision, "compile": compile, "quantize": quantize}
    settings = _settings(redis_url=redis_url, drain_s=drain_s, lora_dir=lora_dir, **work)
    _quiet_libraries()
    from server.worker.loading import Speed, load_model
    from server.worker.main import run_worker

    load = partial(
        load_model,
        merged_loras=lora or (),
        lora_dir=settings.lora_dir,
        speed=Speed.of(settings),
    )
    return run_worker(settings, folder, pool=pool, load=load, token_fd=token_fd)


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    output: Annotated[
        Path, typer.Option("--output", "-o", help="The picture: .png, .jpg or .webp.")
    ],
    model: Model = None,
    seed: Annotated[int | None, typer.Option(show_default="random")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.", show_default=False)] = None,
    height: Annotated[int | None, typer.Option(help="Pixels.", show_default=False)] = None,
    steps: Annotated[int | None, typer.Option(help="Steps.", show_default=False)] = None,
    preset: Annotated[str | None, typer.Option(show_default=False)] = None,
    guidance_scale: Annotated[float | None, typer.Option(show_default=False)] = None,
    negative_prompt: Annotated[str | None, typer.Option(show_default=False)] = None,
    more: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="FIELD=VALUE",
            help="Any other field of POST /generate that shapes a picture; lists as JSON.",
        ),
    ] = None,
    precision: Precision = None,
    lora: Merged = None,
    lora_dir: LoraDir = None,
) -> int:
    """Draw one picture in this process, without a server."""
    folder = _checkpoint_folder(model)
    image_format = _image_format(output)
    settings = _settings(precision=precision, lora_dir=lora_dir)
    options = {
        "seed": seed,
        "preset": preset,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    try:
        request = request_of(prompt, more or [], options)
    except ValueError as error:
        raise MisuseError(str(error)) from None
    _quiet_libraries()
    from server.worker.local import Drawing

    drawing = Drawing(
        folder, settings.precision, merged_loras=lora or (), lora_dir=settings.lora_dir
    )
    try:
        drawing.prepare(request)
    except ValueError as error:
        raise MisuseError(str(error)) from None
    with _progress_bar(drawing.state.num_steps) as advance:
        data = drawing.draw(image_format, advance)
    output.write_bytes(data)
    for warning in drawing.state.warnings:
        print(f"lumina: warning: {warning}", file=sys.stderr)
    print(f"{output}: {drawing.summary}")
    return 0


app.command()(convert)


@app.command()
def inspect(
    path: Annotated[
        Path, typer.Argument(help="A checkpoint folder, a transformer's weights, or a picture.")
    ],
    lora_dir: LoraDir = None,
) -> int:
    """Say what a checkpoint or a file of weights is, or what made a picture."""
    bare_transformer = (path / "config.json").is_file() and not (path / "model_index.json").exists()
    if bare_transformer or path.suffix in WEIGHTS:
        from model.weight_source import open_source

        facts = [("weights of", str(path)), *source_facts(open_source(path))]
    elif path.is_dir():
        _quiet_libraries()
        from server.worker.local import describe_checkpoint

        settings = _settings(lora_dir=lora_dir)
        facts = describe_checkpoint(path, settings.precision, settings.lora_dir)
    elif path.is_file():
        facts = picture_facts(path)
    else:
        raise MisuseError(f"{path}: there is no such file or folder")
    print_facts(facts)
    return 0


def _checkpoint_folder(model: Path | None) -> Path:
    folder = model or BUNDLED_MODEL
    if folder.is_file():
        raise MisuseError(
            f"{folder}: a file, not a checkpoint folder: `lumina convert` makes one of it"
        )
    if not folder.is_dir():
        hint = "" if model else " (the bundled checkpoint); give --model"
        raise MisuseError(f"{folder}: there is no such checkpoint folder{hint}")
    return folder


def _quiet_libraries() -> None:
    """Keep xformers from greeting every command with what its CUDA build lacks here."""
    logging.getLogger("xformers").setLevel(logging.ERROR)


def _check_host(host: str, insecure: bool) -> None:
    from server.api.address import require_loopback

    try:
        require_loopback(host, insecure)
    except ValueError as error:
        raise MisuseError(str(error)) from None


def _settings(**options: object) -> "Settings":
    from server.config import SettingsError, load_settings

    try:
        return load_settings(**options)
    except SettingsError as error:
        raise MisuseError(str(error)) from None


def _image_format(output: Path) -> "OutputFormat":
    image_format = FORMATS.get(output.suffix.lower())
    if image_format is None:
        raise MisuseError(f"--output {output} must end in {', '.join(FORMATS)}")
    if not output.parent.is_dir():
        raise MisuseError(f"--output {output}: there is no folder {output.parent}")
    return image_format


@contextmanager
def _progress_bar(total: int) -> "Iterator[Callable[[], None]]":
    """Yield a function to call after each step; the bar shows on a terminal only."""
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True)
    columns = TextColumn("drawing"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("drawing", total=total)
        yield lambda: progress.advance(task)


def _fail(message: str, code: int) -> int:
    print(f"lumina: {' '.join(message.split())}", file=sys.stderr)
    return code


def _run(argv: list[str], debug: bool) -> int:
    """Run one command; every error that has a sentence becomes an exit code here."""
    from server.errors import ServerError

    try:
        result = app(args=argv or ["--help"], prog_name="lumina", standalone_mode=False)
    except TyperException as error:
        return _fail(error.format_message(), 2)
    except MisuseError as error:
        return _fail(str(error), 2)
    except (ServerError, ValueError, OSError) as error:
        if debug:
            raise
        return _fail(str(error), 1)
    except (KeyboardInterrupt, Abort):
        return _fail("interrupted", 130)
    return result if isinstance(result, int) else 0


def main(argv: list[str] | None = None) -> int:
    """Entry point of `lumina` and `python -m server.cli`; returns the exit code."""
    argv = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in argv
    try:
        return _run([word for word in argv if word != "--debug"], debug)
    except Exception as error:
        if debug:
            raise
        return _fail(f"unexpected {type(error).__name__}: {error} (--debug shows where)", 1)


if __name__ == "__main__":
    sys.exit(main())
