"""Settings of every process of the service: `LUMINA_*` variables, typed and checked once."""

import base64
import ipaddress
import os
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

ENV_PREFIX = "LUMINA_"
SECRET_PREFIX = "whsec_"

Network = ipaddress.IPv4Network | ipaddress.IPv6Network

# Variables of the build, the model library and the command line, read elsewhere.
FOREIGN_VARIABLES = frozenset(
    {"LUMINA_TORCH_INDEX", "LUMINA_ATTENTION", "LUMINA_KERNELS", "LUMINA_API_KEY"}
)


class SettingsError(ValueError):
    """A setting is unknown or has a value that is not allowed."""


def check_webhook_secret(secret: str) -> str:
    """Return `secret`; raises ValueError unless it is whsec_ and base64 of 24 to 64 bytes."""
    try:
        decoded = base64.b64decode(secret.removeprefix(SECRET_PREFIX), validate=True)
    except ValueError:
        decoded = b""
    if not secret.startswith(SECRET_PREFIX) or not 24 <= len(decoded) <= 64:
        raise ValueError(f"a webhook secret must be {SECRET_PREFIX} and base64 of 24 to 64 bytes")
    return secret


def _networks(text: str) -> list[Network]:
    return [ipaddress.ip_network(part.strip()) for part in text.split(",") if part.strip()]


class Settings(BaseSettings):
    """One value per knob; the environment variable is the upper-cased name behind `LUMINA_`.

    Names ending in `_s`, the timeouts and the TTLs are seconds.
    """

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, frozen=True, extra="forbid")

    redis_url: str = "redis://127.0.0.1:6379/0"
    data_dir: Path = Path("data")
    blob_url: str = ""
    """Where pictures are stored, an fsspec URL; empty means `blobs/` in the data directory."""

    log_level: Literal["debug", "info", "warning", "error"] = "info"

    sync_timeout: float = Field(default=300.0, gt=0)
    """How long `POST /generate` waits for a result before it answers 202."""

    durability: Literal["everysec", "fsync", "replica"] = "everysec"
    """What an acknowledged job must have outlived: a second of Redis's memory, its disk's sync, or
    the loss of its server (docs/reliability.md)."""

    internal_port: int = Field(default=8001, ge=0, le=65535)
    """Where an API or worker process alone answers probes and `/metrics`; 0: nowhere. The default
    is passed over where another process has it. `lumina serve` answers on its main port instead."""

    internal_host: str = "127.0.0.1"
    """The address of that port."""

    lease_s: float = Field(default=15.0, ge=0.5)
    max_attempts: int = Field(default=3, ge=1)
    queue_limit: int = Field(default=1000, ge=1)
    """Queued jobs a pool may hold; beyond it a submission is refused."""

    tenant_limit: int = Field(default=512, ge=1)
    """Jobs a tenant may have that have not ended; beyond it a submission is refused."""

    result_ttl: int = Field(default=24 * 3600, ge=60)
    """How long a finished job and its pictures are kept."""

    drain_s: float = Field(default=25.0, ge=0)
    """How long a stopping worker goes on with what it has before it hands jobs back."""

    max_running: int = Field(default=32, ge=1)
    """Jobs a worker holds at once."""

    max_step_tokens: int = Field(default=65536, ge=1)
    """Image and text tokens, over all branches, that one denoising step may carry."""

    compile: Literal["auto", "off", "blocks", "full"] = "auto"
    """What `torch.compile` takes on: nothing, each transformer block, or all of them as a whole;
    auto: `blocks` on a GPU, `off` on a CPU (docs/performance.md)."""

    graph_tokens: int = Field(default=4096, ge=0)
    """Tokens of the largest step that a GPU replays as a CUDA graph; 0: none."""

    quantize: Literal["none", "fp8"] = "none"
    """Whether a worker multiplies in fp8 (docs/performance.md)."""

    warmup_sizes: str = ""
    """Sizes such as `512x512,1024x768` that a worker draws, besides the default one, before it is
    ready: what a first picture of a size costs extra is then paid by nobody."""

    precision: Literal["auto", "fp32", "bf16", "mixed"] = "auto"
    """What a worker computes in; auto: mixed on a GPU, fp32 on a CPU."""

    api_keys: Literal["auto", "required"] = "auto"
    """When requests need an API key: auto: where others than this machine can connect."""

    webhook_secret: str = Field(default="", repr=False)
    """Signs the webhooks of callers without an API key, as `whsec_` and base64; empty: one that is
    drawn once and shown by `lumina keys webhook-secret`."""

    webhook_allow_cidrs: str = ""
    """Networks such as `10.0.0.0/8,fd00::/8` that webhooks may reach although they are private."""

    lora_dir: Path | None = None
    """Folder of LoRA files that requests may name."""

    c2pa_cert: Path | None = None
    """PEM chain of the certificate that signs pictures with C2PA content credentials."""

    c2pa_key: Path | None = None
    """PEM private key of `c2pa_cert`."""

    @field_validator("warmup_sizes")
    @classmethod
    def _check_sizes(cls, sizes: str) -> str:
        if sizes and not re.fullmatch(r"\s*\d+x\d+\s*(,\s*\d+x\d+\s*)*", sizes):
            raise ValueError("must be a list of sizes such as 512x512,1024x768")
        return sizes

    @field_validator("webhook_secret")
    @classmethod
    def _check_secret(cls, secret: str) -> str:
        return check_webhook_secret(secret) if secret else secret

    @field_validator("webhook_allow_cidrs")
    @classmethod
    def _check_networks(cls, networks: str) -> str:
        _networks(networks)
        return networks

    @property
    def webhook_networks(self) -> list[Network]:
        """The networks of `webhook_allow_cidrs`."""
        return _networks(self.webhook_allow_cidrs)

    @property
    def chose_internal_port(self) -> bool:
        """Whether somebody asked for that very port."""
        return "internal_port" in self.model_fields_set

    @property
    def warmup(self) -> list[tuple[int, int]]:
        """The sizes of `warmup_sizes`, as width and height in pixels."""
        return [(int(w), int(h)) for w, h in re.findall(r"(\d+)x(\d+)", self.warmup_sizes)]

    @property
    def blob_store_url(self) -> str:
        """The fsspec URL of the blob store, with the data directory filled in."""
        return self.blob_url or f"file://{(self.data_dir / 'blobs').resolve()}"


def load_settings(**overrides: Any) -> Settings:
    """Read the environment; `overrides` (command-line options, None = not given) win.

    Raises SettingsError with one sentence for an unknown `LUMINA_*` variable or a bad value.
    """
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields} | FOREIGN_VARIABLES
    unknown = sorted(
        name for name in os.environ if name.startswith(ENV_PREFIX) and name not in known
    )
    if unknown:
        raise SettingsError(f"{unknown[0]}: unknown setting; known are {', '.join(sorted(known))}")
    given = {name: value for name, value in overrides.items() if value is not None}
    try:
        return Settings(**given)
    except ValidationError as error:
        first = error.errors()[0]
        name = ENV_PREFIX + str(first["loc"][0]).upper() if first["loc"] else "settings"
        secret = name == ENV_PREFIX + "WEBHOOK_SECRET"
        shown = "" if secret else f", got {first['input']!r}"
        sentence = first["msg"].removeprefix("Value error, ")
        raise SettingsError(f"{name}: {sentence}{shown}") from None
