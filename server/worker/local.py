"""The model in this process, without a queue: what `lumina generate` and `lumina inspect` do."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from model import GenerationRequest
from model.checkpoint import verify_manifest
from model.pipeline import DenoiseState, Pipeline
from model.templates import TEMPLATE_NAMES, compose_prompt
from model.weight_source import open_source
from server.protocol import OutputFormat
from server.worker.content_credentials import ContentCredentials
from server.worker.loading import load_model
from server.worker.picture_file import encode_image, parameters_of


class Drawing:
    """One picture on its way, from a checkpoint folder to the bytes of a file.

    Raises ValueError (`CheckpointError`) when the checkpoint cannot be used.

    Args:
        folder: of the checkpoint.
        precision: as in `load_model`.
        merged_loras: as in `load_model`.
        lora_dir: as in `load_model`.
        credentials: sign the picture, where configured.
    """

    def __init__(
        self,
        folder: Path,
        precision: str = "auto",
        *,
        merged_loras: Sequence[tuple[Path, float]] = (),
        lora_dir: Path | None = None,
        credentials: ContentCredentials | None = None,
    ) -> None:
        self._credentials = credentials
        self._model = load_model(folder, precision, merged_loras=merged_loras, lora_dir=lora_dir)
        assert isinstance(self._model.pipeline, Pipeline)
        self._pipeline = self._model.pipeline
        self._state: DenoiseState | None = None
        self._seconds = 0.0

    @property
    def state(self) -> DenoiseState:
        """What `prepare` made."""
        assert self._state is not None
        return self._state

    def prepare(self, request: GenerationRequest) -> None:
        """Take the request; raises ValueError when this checkpoint cannot do what it asks."""
        self._state = self._pipeline.prepare(request)

    def draw(
        self, image_format: OutputFormat, on_step: Callable[[], None], *, embed: bool = True
    ) -> bytes:
        """Return the file of the picture; `on_step` is called after every denoising step.

        With `embed` the file says how it was made, where it has room for that.
        """
        started = time.monotonic()
        while not self.state.finished:
            self._pipeline.denoise_step([self.state])
            on_step()
        ((image,),) = self._pipeline.decode([self.state])
        self._seconds = time.monotonic() - started
        info = self._model.info
        parameters = parameters_of(self.state.request, info.name, info.hash, 0) if embed else None
        data = encode_image(image, image_format, None, parameters)
        if self._credentials is not None:
            data = self._credentials.sign(data, image_format, info.name, info.hash)
        return data

    @property
    def summary(self) -> str:
        """What was drawn, in a few words."""
        request = self.state.request
        return (
            f"{request.width}x{request.height}, seed {request.seed}, "
            f"{self.state.num_steps} steps ({self.state.nfe} evaluations with guidance), "
            f"{self.state.prompt_tokens} prompt tokens, {self._seconds:.1f} s"
        )


def describe_checkpoint(
    folder: Path, precision: str = "auto", lora_dir: Path | None = None
) -> list[tuple[str, str]]:
    """Load a checkpoint and return what it is, and how it would be computed here, as lines.

    With a folder of LoRAs, also what each of these is.

    Raises ValueError (`CheckpointError`) with one line that names the file and the fault.
    """
    model = load_model(folder, precision, lora_dir=lora_dir)
    assert isinstance(model.pipeline, Pipeline)
    config, info = model.pipeline.dit.config, model.info
    limits = f"{info.min_size} to {info.max_size} pixels in steps of {info.size_multiple}"
    parts = {
        "transformer": model.pipeline.dit,
        "vae": model.pipeline.vae.autoencoder,
        "text encoder": model.pipeline.text_encoder.model,
    }
    facts = [("checkpoint", str(folder)), ("manifest", _manifest_line(folder)), ("hash", info.hash)]
    source = open_source(folder / "transformer")
    facts += [
        ("family", f"Lumina-Image 2.0, {source.size or 'no named size'}"),
        ("stored", f"{' and '.join(source.dtypes)}, {source.dialect.name} names"),
    ]
    for name, module in parts.items():
        millions = sum(weight.numel() for weight in module.parameters()) / 1e6
        facts.append((name, f"{millions:.2f} million weights"))
    facts.append(
        (
            "network",
            f"{config.num_layers} layers, hidden size {config.hidden_size}, "
            f"{config.num_attention_heads} heads ({config.num_kv_heads} for keys and values)",
        )
    )
    facts += [("sizes", limits), ("steps", f"1 to {info.max_steps}")]
    facts += [("defaults", _settings_line(info.defaults))]
    facts += [(f"preset {name}", _settings_line(preset)) for name, preset in info.presets.items()]
    loras = model.pipeline.loras
    for name, file in loras.files.items() if loras is not None else ():
        facts.append((f"lora {name}", ", ".join(f"{what} {value}" for what, value in file.facts)))
    return [*facts, ("prompt tokens", _token_line(model.pipeline)), *model.arithmetic.items()]


def _settings_line(settings: Mapping[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in settings.items() if value != "")


def _token_line(pipeline: Pipeline) -> str:
    """How many tokens a prompt may have, and how many of them each template takes."""
    encoder = pipeline.text_encoder
    taken = [f"{name} {encoder.count_tokens(compose_prompt('', name))}" for name in TEMPLATE_NAMES]
    return f"{encoder.max_tokens}, of which the template takes: {', '.join(taken)}"


def _manifest_line(folder: Path) -> str:
    manifest = verify_manifest(folder)
    if manifest is None:
        return "none"
    return f"verified, {len(manifest['files'])} files"
