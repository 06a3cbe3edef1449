"""Records of a data set on disk: a picture and what may be said about it.

A folder holds ``records.jsonl``, one record a line: ``{"image": path, "captions": [{"text",
"level", "language"}], "domain"}``, paths relative to the folder; level, language and domain may be
missing, and ``"prompt": text`` may stand in the place of the captions. `trainer data build` writes
such a folder.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from model.templates import compose_prompt
from trainer.config import FlowStageConfig

RECORDS_FILE = "records.jsonl"
DEFAULT_DOMAIN = "default"


class BadRecordError(ValueError):
    """A record that cannot be trained on; the message says which and why."""


@dataclass(frozen=True, slots=True)
class Caption:
    """One text of a record; level and language are "" where it does not say."""

    text: str
    level: str = ""
    language: str = ""


@dataclass(frozen=True, slots=True)
class Record:
    """A picture, its captions and the domain that chooses the system prompt."""

    name: str
    path: Path
    captions: tuple[Caption, ...]
    domain: str = DEFAULT_DOMAIN


@dataclass(frozen=True, slots=True)
class Fault:
    """A record that was left out, and why."""

    name: str
    reason: str


def read_records(folder: Path) -> tuple[list[Record], list[Fault]]:
    """All usable records in file order, and those that are not.

    Whether a picture can be decoded shows only when it is encoded.

    Raises:
        ValueError: when there is no record file.
    """
    file = folder / RECORDS_FILE
    if not file.is_file():
        raise ValueError(f"data.path {str(folder)!r} holds no {RECORDS_FILE}")
    records, faults = [], []
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                records.append(_parse(line, folder))
            except BadRecordError as error:
                faults.append(Fault(f"{RECORDS_FILE}:{number}", str(error)))
    return records, faults


def _parse(line: str, folder: Path) -> Record:
    try:
        data = json.loads(line)
    except json.JSONDecodeError as error:
        raise BadRecordError(f"not valid JSON ({error.msg})") from None
    if not isinstance(data, dict) or not isinstance(data.get("image"), str):
        raise BadRecordError("'image' must name a file")
    captions = data.get("captions", [{"text": data.get("prompt", "")}])
    if not isinstance(captions, list):
        raise BadRecordError("'captions' must be a list")
    found = tuple(caption for caption in map(_caption, captions) if caption.text.strip())
    if not found:
        raise BadRecordError(f"{data['image']}: there is no caption with text")
    path = folder / data["image"]
    if not path.is_file():
        raise BadRecordError(f"{data['image']}: there is no such file")
    return Record(data["image"], path, found, str(data.get("domain", DEFAULT_DOMAIN)))


def _caption(data: Any) -> Caption:
    if isinstance(data, str):
        return Caption(data)
    if not isinstance(data, dict) or not isinstance(data.get("text"), str):
        raise BadRecordError("a caption must be a text, or hold one under 'text'")
    return Caption(data["text"], str(data.get("level", "")), str(data.get("language", "")))


class CaptionChoice:
    """Draws one caption of a record by the weights of a stage, or none at all."""

    def __init__(self, config: FlowStageConfig) -> None:
        self._config = config

    def weights(self, captions: Sequence[Caption]) -> list[float]:
        """Of each caption: its level's times its language's; what it does not say weighs 1."""
        levels, languages = self._config.levels, self._config.languages
        return [
            (levels.get(caption.level, 0.0) if caption.level else 1.0)
            * (languages.get(caption.language, 0.0) if caption.language else 1.0)
            for caption in captions
        ]

    def draw(self, record: Record, rng: np.random.Generator) -> int | None:
        """Place of the caption drawn; None: dropped, the empty string without system prompt."""
        dropped = rng.random() < self._config.caption_dropout
        weights = np.cumsum(self.weights(record.captions))
        place = int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))
        return None if dropped else min(place, len(record.captions) - 1)

    def prompt(self, record: Record, place: int | None) -> str:
        """The text the encoder reads: the domain's system prompt, then the caption."""
        if place is None:
            return ""
        domains = self._config.domains
        template = domains.get(record.domain, domains[DEFAULT_DOMAIN])
        return compose_prompt(record.captions[place].text, template)

    def check(self, record: Record) -> None:
        """Raises BadRecordError when no caption of the record can ever be drawn."""
        if sum(self.weights(record.captions)) <= 0:
            raise BadRecordError("no caption has a level and language that the stage draws")
