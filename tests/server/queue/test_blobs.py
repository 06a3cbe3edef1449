import hashlib

import pytest

from server.errors import BlobUnavailable, NotFound
from server.queue.blobs import BlobStore, image_path

PATH = image_path("anonymous", "job", 2, 0, "png")


@pytest.fixture(params=["file", "memory"])
def store(request, tmp_path):
    return BlobStore(f"file://{tmp_path}" if request.param == "file" else f"memory://{tmp_path}")


def test_what_goes_in_comes_out(store):
    assert PATH == "results/anonymous/job/2/0.png"
    assert store.put(PATH, b"data") == hashlib.sha256(b"data").hexdigest()
    assert store.exists(PATH)
    assert store.get(PATH) == b"data"
    store.put(PATH, b"newer")
    assert store.get(PATH) == b"newer"


def test_what_is_not_there(store):
    assert not store.exists(PATH)
    with pytest.raises(NotFound, match=PATH):
        store.get(PATH)
    store.delete(PATH)


def test_delete(store):
    store.put(PATH, b"data")
    store.delete(PATH)
    assert not store.exists(PATH)


@pytest.mark.parametrize("path", ["../secret", "/etc/passwd", "results/../../x", "results//x"])
def test_paths_cannot_leave_the_store(store, path):
    with pytest.raises(AssertionError):
        store.get(path)


def test_a_write_that_fails_leaves_nothing(tmp_path):
    class FullDisk(BlobStore):
        @staticmethod
        def _write_synced(path, data):
            with open(path, "wb") as file:
                file.write(data[:1])
            raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        FullDisk(f"file://{tmp_path}").put(PATH, b"data")
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_bytes_that_come_back_wrong_are_no_success(tmp_path):
    class Lossy(BlobStore):
        @staticmethod
        def _write_synced(path, data):
            with open(path, "wb") as file:
                file.write(data[:-1])

    with pytest.raises(OSError, match="other bytes"):
        Lossy(f"file://{tmp_path}").put(PATH, b"data")


def test_bytes_that_changed_later_are_not_given(tmp_path):
    store = BlobStore(f"file://{tmp_path}")
    digest = store.put(PATH, b"data")
    assert store.get(PATH, digest) == b"data"
    (file,) = [path for path in tmp_path.rglob("*") if path.is_file()]
    file.write_bytes(b"date")
    assert store.get(PATH) == b"date"
    with pytest.raises(BlobUnavailable, match="other bytes"):
        store.get(PATH, digest)


def test_a_store_that_fails_is_one_error_whatever_it_raises(tmp_path):
    (tmp_path / "results").write_bytes(b"a file where a folder should be")
    store = BlobStore(f"file://{tmp_path}")
    with pytest.raises(BlobUnavailable, match="blob store failed"):
        store.put(PATH, b"data")
    with pytest.raises((BlobUnavailable, NotFound)):
        store.get(PATH)
