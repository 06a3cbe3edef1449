"""A file system that loses what it is given: every third write fails in one of three ways."""

import errno
import itertools
import os

import fsspec
from fsspec.implementations.local import LocalFileSystem


class FlakyFileSystem(LocalFileSystem):
    """`flaky:///dir`: a disk that is full, a write that breaks off, a store that cuts silently."""

    protocol = "flaky"
    turn = itertools.count()

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.removeprefix("flaky://"))

    def pipe_file(self, path, value, mode="overwrite", **kwargs):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        way = next(self.turn) % 9
        if way == 2:
            raise OSError(errno.ENOSPC, "no space left on device")
        super().pipe_file(path, value[: len(value) // 2] if way in (5, 8) else value, mode)
        if way == 5:
            raise OSError(errno.EIO, "the write broke off")


def register() -> None:
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
