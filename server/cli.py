"""The `lumina` command. Thin: it reads options, checks them, and calls what does the work.

Heavy imports wait until a command runs: `lumina --help` is quick and `lumina api` has no torch.
Exit codes: 0 done, 1 failed, 2 misuse. Errors are one line on stderr, a traceback with `--debug`.
"""

import logging
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.exceptions import Abort, TyperException

from server.conversion import convert, print_facts, source_facts
from server.generation import ApiKey, NoParameters, ServerUrl, Wish, draw_here, draw_there
from server.inspection import picture_facts
from server.key_commands import keys_app
from server.lora_options import LoraDir, Merged
from server.misuse import MisuseError
from server.operate import dead_app, epoch_app
from server.speed_options import Compile, Quantize

if TYPE_CHECKING:
    from server.config import Settings

BUNDLED_MODEL = Path(__file__).resolve().parent.parent / "checkpoints" / "demo"
WEIGHTS = (".safetensors", ".pth", ".pt", ".ckpt", ".bin")  # the last four only to refuse them

app = typer.Typer(
    name="lumina",
    help="Text to image with the Lumina-Image 2.0 family.",
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)


app.add_typer(dead_app, name="dead")
app.add_typer(epoch_app, name="epoch")
app.add_typer(keys_app, name="keys")


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
    bool, typer.Option("--insecure", help="Serve everybody who can connect, without API keys.")
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
    work = {"precision": precision, "compile": compile, "quantize": quantize}
    settings = _settings(redis_url=redis_url, data_dir=data_dir, lora_dir=lora_dir, **work)
    _check_host(host, insecure, settings)
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
    settings = _settings(redis_url=redis_url)
    _check_host(host, insecure, settings)
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
    no_parameters: NoParameters = False,
    url: ServerUrl = None,
    api_key: ApiKey = None,
) -> int:
    """Draw one picture, in this process or by a server."""
    options: dict[str, object] = {
        "seed": seed,
        "preset": preset,
        "width": width,
        "height": height,
        "num_inference_steps": steps,
        "guidance_scale": guidance_scale,
        "negative_prompt": negative_prompt,
    }
    here_only = {"--precision": precision, "--lora": lora, "--lora-dir": lora_dir}
    if url is not None:
        for option in (name for name, value in here_only.items() if value is not None):
            raise MisuseError(f"{option} is for drawing in this process, not with --url")
        options["model"] = str(model) if model else None
    wish = Wish(prompt, output, options, more or [], embed_parameters=not no_parameters)
    if url is not None:
        draw_there(wish, url, api_key)
        return 0
    folder = _checkpoint_folder(model)
    _quiet_libraries()
    draw_here(wish, folder, _settings(precision=precision, lora_dir=lora_dir), lora or ())
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


def _check_host(host: str, insecure: bool, settings: "Settings") -> None:
    from server.api.address import keys_required

    try:
        keys_required(host, insecure, settings.api_keys)
    except ValueError as error:
        raise MisuseError(str(error)) from None


def _settings(**options: object) -> "Settings":
    from server.config import SettingsError, load_settings

    try:
        return load_settings(**options)
    except SettingsError as error:
        raise MisuseError(str(error)) from None


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
