"""Training state on disk: written whole or not at all."""

import os
from pathlib import Path
from typing import Any

import torch

STATE = "state.pt"


def save_state(folder: Path, state: dict[str, Any]) -> None:
    """Write ``state`` atomically: a kill at any moment leaves the former state or this one."""
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f"{STATE}.tmp"
    torch.save(state, temporary)
    os.replace(temporary, folder / STATE)


def load_state(folder: Path) -> dict[str, Any] | None:
    """The last whole state, or None."""
    path = folder / STATE
    if not path.is_file():
        return None
    state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    return state
