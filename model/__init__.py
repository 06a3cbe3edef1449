"""The Lumina-Image 2.0 model in PyTorch: network, text encoder, VAE, samplers and the pipeline.

Knows nothing of queues, HTTP or training loops. The public names are loaded on first use, so that
`import model` alone stays cheap.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from model.loading import load_pipeline
    from model.next_dit import NextDiT
    from model.request import GenerationRequest

__all__ = ["GenerationRequest", "NextDiT", "load_pipeline"]

_HOME = {
    "GenerationRequest": "model.request",
    "NextDiT": "model.next_dit",
    "load_pipeline": "model.loading",
}


def __getattr__(name: str) -> object:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)
