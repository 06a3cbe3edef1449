"""What the OpenAI-compatible endpoints take and give."""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from server.api.schemas import (
    MAX_IMAGES,
    MAX_SEED,
    MAX_TEXT,
    GenerateBody,
    InvalidFields,
    parse_generate,
    shown,
)
from server.protocol import ImageRef, OutputFormat

MAX_PARTIAL_IMAGES = 3
PATCH = 16  # pixels on a side of what the network counts as one token
_SIZE = r"^(auto|[1-9][0-9]{0,4}x[1-9][0-9]{0,4})$"
_IGNORED = "accepted without effect: a text of at most 512 characters"


class ImagesBody(BaseModel):
    """The body of `POST /v1/images/generations`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    prompt: str = Field(
        min_length=1,
        max_length=MAX_TEXT,
        description=f"a text of 1 to {MAX_TEXT} characters that is not blank",
        examples=["three yellow stars"],
    )
    model: str | None = Field(None, description="the name of a served model (GET /v1/models)")
    n: int | None = Field(
        None, ge=1, le=MAX_IMAGES, description=f"a whole number from 1 to {MAX_IMAGES}"
    )
    size: str | None = Field(
        None, pattern=_SIZE, description="'auto' or WIDTHxHEIGHT in pixels, such as '128x96'"
    )
    response_format: Literal["b64_json", "url"] | None = Field(
        None, description="'b64_json' (the default) or 'url'"
    )
    output_format: OutputFormat | None = Field(None, description="'png', 'jpeg' or 'webp'")
    output_compression: int | None = Field(
        None, ge=0, le=100, description="a whole number from 0 to 100 (for jpeg and webp)"
    )
    stream: bool | None = Field(None, description="true or false")
    partial_images: int | None = Field(
        None,
        ge=0,
        le=MAX_PARTIAL_IMAGES,
        description=f"a whole number from 0 to {MAX_PARTIAL_IMAGES} (for a stream)",
    )
    seed: int | None = Field(
        None, ge=0, le=MAX_SEED, description=f"a whole number from 0 to {MAX_SEED}"
    )
    user: str | None = Field(None, max_length=512, description=_IGNORED)
    safety_identifier: str | None = Field(None, max_length=512, description=_IGNORED)
    quality: str | None = Field(None, max_length=512, description=_IGNORED)
    background: str | None = Field(None, max_length=512, description=_IGNORED)
    moderation: str | None = Field(None, max_length=512, description=_IGNORED)
    style: str | None = Field(None, max_length=512, description=_IGNORED)


class InputTokens(BaseModel):
    """Tokens of what was asked."""

    text_tokens: int
    image_tokens: int = 0


class TokenUsage(BaseModel):
    """Tokens of the prompt, template included, and of the pictures: a token is 16 x 16 pixels."""

    input_tokens: int
    input_tokens_details: InputTokens
    output_tokens: int
    total_tokens: int


class ImageData(BaseModel):
    """One picture; `seed` draws it again."""

    b64_json: str | None = None
    url: str | None = None
    seed: int


class ImagesAnswer(BaseModel):
    """Finished pictures."""

    created: int = Field(description="Unix time in seconds")
    background: Literal["opaque"] = "opaque"
    output_format: OutputFormat
    size: str
    data: list[ImageData]
    usage: TokenUsage


class ModelAnswer(BaseModel):
    """A served model."""

    id: str
    object: Literal["model"] = "model"
    created: int = 0
    owned_by: str = "lumina-serve"


class ModelList(BaseModel):
    """All served models."""

    object: Literal["list"] = "list"
    data: list[ModelAnswer]


def native_body(asked: ImagesBody) -> GenerateBody:
    """The same wish in our own words; raises InvalidFields for what no model could draw."""
    fields: dict[str, Any] = {
        "prompt": asked.prompt,
        "model": asked.model,
        "num_images": asked.n,
        "seed": asked.seed,
        "output_format": asked.output_format,
    }
    if asked.size not in (None, "auto"):
        fields["width"], fields["height"] = map(int, asked.size.split("x"))
        if fields["width"] % 16 or fields["height"] % 16:
            sentence = f"size must have multiples of 16, got {shown(asked.size)}"
            raise InvalidFields([("size", sentence)])
    if asked.output_compression is not None:
        fields["quality"] = max(1, asked.output_compression)
    return parse_generate(fields)


def token_usage(prompt_tokens: int, images: list[ImageRef]) -> TokenUsage:
    """What a request with these pictures came to."""
    drawn = sum((image.width // PATCH) * (image.height // PATCH) for image in images)
    return TokenUsage(
        input_tokens=prompt_tokens,
        input_tokens_details=InputTokens(text_tokens=prompt_tokens),
        output_tokens=drawn,
        total_tokens=prompt_tokens + drawn,
    )
