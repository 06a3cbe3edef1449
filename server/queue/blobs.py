"""BlobStore: finished pictures, by path, on whatever fsspec can reach."""

import contextlib
import hashlib
import os
import secrets

import fsspec

from server.errors import NotFound


def image_path(tenant: str, job_id: str, claim_no: int, index: int, extension: str) -> str:
    """Where picture `index` of a job goes; the claim in it keeps late workers apart."""
    return f"results/{tenant}/{job_id}/{claim_no}/{index}.{extension}"


class BlobStore:
    """Bytes by path below `url` (`file:///dir`, `s3://bucket/prefix`, ...).

    All methods block: call them in threads. Paths come from `image_path`, never from users.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._fs, self._root = fsspec.core.url_to_fs(url)
        # Object stores publish a whole object at once; a file system needs a rename.
        self._rename = "file" in (
            self._fs.protocol if isinstance(self._fs.protocol, tuple) else (self._fs.protocol,)
        )

    def put(self, path: str, data: bytes) -> str:
        """Store `data`; readers see all of it or nothing. Returns its sha256 in hex."""
        target = self._full(path)
        if self._rename:
            self._fs.makedirs(os.path.dirname(target), exist_ok=True)
            partial = f"{target}.{secrets.token_hex(4)}.part"
            try:
                self._write_synced(partial, data)
                os.replace(partial, target)
            except OSError:
                with contextlib.suppress(OSError):
                    os.unlink(partial)
                raise
        else:
            self._fs.pipe_file(target, data)
        return hashlib.sha256(data).hexdigest()

    def get(self, path: str) -> bytes:
        """Return the bytes at `path`; raises NotFound."""
        try:
            data: bytes = self._fs.cat_file(self._full(path))
        except FileNotFoundError:
            raise NotFound(f"there is no blob {path}") from None
        return data

    def exists(self, path: str) -> bool:
        """Whether there is a blob at `path`."""
        return bool(self._fs.exists(self._full(path)))

    def delete(self, path: str) -> None:
        """Remove the blob at `path`, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def _full(self, path: str) -> str:
        assert not {"", "..", "."} & set(path.split("/")), path
        return f"{self._root.rstrip('/')}/{path}"

    @staticmethod
    def _write_synced(path: str, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
