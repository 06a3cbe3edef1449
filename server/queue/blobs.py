"""BlobStore: finished pictures, by path, on whatever fsspec can reach."""

import contextlib
import hashlib
import os
import secrets
import time
from dataclasses import dataclass

import fsspec

from server import metrics
from server.errors import BlobUnavailable, NotFound

RESULTS = "results"


def image_path(tenant: str, job_id: str, claim_no: int, index: int, extension: str) -> str:
    """Where picture `index` of a job goes; the claim in it keeps late workers apart."""
    return f"{RESULTS}/{tenant}/{job_id}/{claim_no}/{index}.{extension}"


@dataclass(frozen=True)
class StoredClaim:
    """What one claim of a job has stored; `modified_s` is the Unix time of its latest change."""

    path: str
    claim_no: int
    modified_s: float


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
        """Store `data`; readers see all of it or nothing. Returns its sha256 in hex.

        What was stored is read back: raises BlobUnavailable where it is not what was given, and
        where it could not be stored.
        """
        target = self._full(path)
        digest = hashlib.sha256(data).hexdigest()
        try:
            if self._rename:
                self._publish(target, data)
            else:
                self._fs.pipe_file(target, data)
            stored = self._fs.cat_file(target)
        except Exception as error:  # every file system of fsspec has its own
            metrics.blob_errors.labels("put").inc()
            raise BlobUnavailable(f"the blob store failed: {error}") from error
        if hashlib.sha256(stored).hexdigest() != digest:
            metrics.blob_errors.labels("put").inc()
            raise BlobUnavailable(f"the blob store holds other bytes at {path} than were written")
        return digest

    def get(self, path: str, sha256: str = "") -> bytes:
        """Return the bytes at `path`, which must have that hash if one is given.

        Raises NotFound, and BlobUnavailable where the store fails or gives other bytes.
        """
        target = self._full(path)
        try:
            data: bytes = self._fs.cat_file(target)
        except FileNotFoundError:
            raise NotFound(f"there is no blob {path}") from None
        except Exception as error:
            metrics.blob_errors.labels("get").inc()
            raise BlobUnavailable(f"the blob store failed ({type(error).__name__})") from error
        if sha256 and hashlib.sha256(data).hexdigest() != sha256:
            metrics.blob_errors.labels("get").inc()
            raise BlobUnavailable(f"the blob store gives other bytes at {path} than were stored")
        return data

    def exists(self, path: str) -> bool:
        """Whether there is a blob at `path`."""
        return bool(self._fs.exists(self._full(path)))

    def delete(self, path: str) -> None:
        """Remove the blob at `path`, if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm_file(self._full(path))

    def remove_job(self, tenant: str, job_id: str) -> None:
        """Remove all pictures of a job, whatever claims stored them; raises BlobUnavailable."""
        try:
            for claim in self.claims(tenant, job_id):
                self.remove_claim(claim)
        except Exception as error:
            raise BlobUnavailable(f"the blob store failed ({type(error).__name__})") from error

    # For the sweeper ----------------------------------------------------------------------------

    def tenants(self) -> list[str]:
        """Names of the tenants with pictures."""
        return self._names(RESULTS)

    def jobs(self, tenant: str) -> list[str]:
        """Ids of a tenant's jobs with pictures."""
        return self._names(f"{RESULTS}/{tenant}")

    def claims(self, tenant: str, job_id: str) -> list[StoredClaim]:
        """What each claim of a job has stored, half-written files too."""
        parent = f"{RESULTS}/{tenant}/{job_id}"
        numbers = [name for name in self._names(parent) if name.isdigit()]
        if not numbers:
            self._remove_empty(parent)
        paths = [f"{parent}/{number}" for number in numbers]
        return [
            StoredClaim(path, int(number), self._modified_s(path))
            for path, number in zip(paths, numbers, strict=True)
        ]

    def remove_claim(self, claim: StoredClaim) -> None:
        """Remove all that a claim has stored."""
        with contextlib.suppress(FileNotFoundError):
            self._fs.rm(self._full(claim.path), recursive=True)
        self._remove_empty(os.path.dirname(claim.path))

    def _names(self, path: str) -> list[str]:
        try:
            found = self._fs.ls(self._full(path), detail=False, refresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in found)

    def _modified_s(self, path: str) -> float:
        """The latest change below `path`; now, where nobody knows."""
        latest = 0.0
        for name in self._fs.find(self._full(path)):
            with contextlib.suppress(FileNotFoundError):
                latest = max(latest, self._fs.modified(name).timestamp())
        return latest or time.time()

    def _remove_empty(self, path: str) -> None:
        if self._rename:
            with contextlib.suppress(OSError):
                os.rmdir(self._full(path))

    def _publish(self, target: str, data: bytes) -> None:
        folder = os.path.dirname(target)
        self._fs.makedirs(folder, exist_ok=True)
        partial = f"{target}.{secrets.token_hex(4)}.part"
        try:
            self._write_synced(partial, data)
            os.replace(partial, target)
        except OSError:
            with contextlib.suppress(OSError):
                os.unlink(partial)
            raise
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)  # the name too must survive a power cut
        finally:
            os.close(descriptor)

    def _full(self, path: str) -> str:
        assert not {"", "..", "."} & set(path.split("/")), path
        return f"{self._root.rstrip('/')}/{path}"

    @staticmethod
    def _write_synced(path: str, data: bytes) -> None:
        with open(path, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
