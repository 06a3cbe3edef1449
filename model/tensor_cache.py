"""A cache of tensors that is bounded by their bytes, the least recently used leaving first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

from torch import Tensor

K = TypeVar("K", bound=Hashable)


class TensorCache(Generic[K]):
    """Tuples of tensors by key. One thread at a time.

    Args:
        max_bytes: of all tensors together; the newest entry stays even if it alone has more.
    """

    def __init__(self, max_bytes: int) -> None:
        self._max_bytes = max_bytes
        self._entries: OrderedDict[K, tuple[Tensor, ...]] = OrderedDict()
        self.num_bytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, key: K, make: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """The entry of `key`; made, and older ones dropped, where there is none."""
        found = self._entries.get(key)
        if found is not None:
            self._entries.move_to_end(key)
            return found
        made = make()
        self._entries[key] = made
        self.num_bytes += _size(made)
        while self.num_bytes > self._max_bytes and len(self._entries) > 1:
            _, oldest = self._entries.popitem(last=False)
            self.num_bytes -= _size(oldest)
        return made


def _size(entry: tuple[Tensor, ...]) -> int:
    return sum(tensor.nbytes for tensor in entry)
