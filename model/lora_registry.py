"""The LoRAs that requests may name: the files of one folder, loaded ahead or when first asked for.

A name is a file's name without `.safetensors`. It is looked up among the names found at the start
and never becomes a path. All files are checked then, by their headers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path

from model.adapters import Adapter, Adapters, Lora
from model.checkpoint import PICKLES, CheckpointError, short_name
from model.lora import LoraFile, open_lora
from model.next_dit import NextDiT
from model.request import MAX_LORA_NAME, LoraChoice

CACHE_BYTES = 2 * 2**30  # dozens of LoRAs of the released size; running requests hold theirs anyway


class LoraRegistry:
    """LoRA files by name. One thread at a time.

    Args:
        folder: its `.safetensors` files are on offer.
        dit: the network they must fit; they are loaded where it is and in the dtype of its weights.
        cache_bytes: of loaded LoRAs; the one in use stays even if it alone has more.

    Raises:
        CheckpointError: one line naming the first file that cannot be used.
    """

    def __init__(self, folder: Path, dit: NextDiT, *, cache_bytes: int = CACHE_BYTES) -> None:
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: there is no such folder of LoRAs")
        self.files = {
            _name(path): open_lora(path, dit.config)
            for path in sorted(folder.iterdir())
            if path.suffix in (".safetensors", *PICKLES) and not path.name.startswith(".")
        }
        self._device, self._dtype = dit.device, dit.dtype
        self._cache_bytes = cache_bytes
        self._loaded: OrderedDict[str, Lora] = OrderedDict()

    @property
    def names(self) -> tuple[str, ...]:
        """What is on offer, sorted."""
        return tuple(sorted(self.files))

    def get(self, name: str) -> Lora:
        """The LoRA of this name on its device, read from its file if it is not there already.

        Raises:
            KeyError: no file has that name.
            CheckpointError: its file has changed since the start and cannot be read.
        """
        lora = self._loaded.pop(name, None) or self._load(name, self.files[name])
        self._loaded[name] = lora
        while self.num_bytes > self._cache_bytes and len(self._loaded) > 1:
            self._loaded.popitem(last=False)
        return lora

    def load_ahead(self, beat: Callable[[], None] = lambda: None) -> None:
        """Read the files, as many as the cache holds, so that no request waits for one.

        Args:
            beat: called after each, to show progress.

        Raises:
            CheckpointError: one line naming a file that cannot be read.
        """
        for count, name in enumerate(self.files, 1):
            self.get(name)
            beat()
            if len(self._loaded) < count:  # the cache is full
                return

    @property
    def growth_bytes(self) -> int:
        """Memory that LoRAs may take beyond what they take now."""
        if len(self._loaded) == len(self.files):
            return 0
        return max(0, self._cache_bytes - self.num_bytes)

    @property
    def num_bytes(self) -> int:
        """Memory of the loaded LoRAs."""
        return sum(lora.num_bytes for lora in self._loaded.values())

    def _load(self, name: str, file: LoraFile) -> Lora:
        return file.load(name, device=self._device, dtype=self._dtype)


def chosen_adapters(registry: LoraRegistry | None, choices: Sequence[LoraChoice]) -> Adapters:
    """The adapters a request names; a factor of 0 leaves the network as it is.

    Raises:
        ValueError: one sentence that lists what is on offer.
    """
    names = registry.names if registry is not None else ()
    for choice in choices:
        if choice.name not in names:
            offer = ", ".join(repr(name) for name in names)
            offered = f"on offer are {offer}" if offer else "none is on offer (see --lora-dir)"
            raise ValueError(f"lora {choice.name!r} is not allowed: {offered}")
    if registry is None:
        return ()
    return tuple(Adapter(registry.get(c.name), c.scale) for c in choices if c.scale != 0.0)


def _name(path: Path) -> str:
    if len(path.stem) > MAX_LORA_NAME or not path.stem.isprintable():
        raise CheckpointError(
            f"{short_name(path)}: a LoRA's name must have 1 to {MAX_LORA_NAME} printable characters"
        )
    return path.stem
