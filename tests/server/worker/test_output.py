"""From pictures to a commit: what the stored files say, as the request and the operator want it."""

import io
import json
from concurrent.futures import Future

import c2pa
import pytest
from PIL import Image

from server.queue.blobs import BlobStore
from server.worker.content_credentials import open_credentials
from server.worker.engine import ActiveJob, Decoded
from server.worker.output import Output
from server.worker.picture_file import read_parameters
from tests.certificates import make_signing
from tests.fakes import FakePipeline, wait_until
from tests.server.worker.test_engine import claim


class Commits:
    """Stands for the intake: remembers what was committed."""

    def __init__(self):
        self.results, self.errors = [], []

    def storing(self, claim):
        pass

    def complete(self, claim, result):
        self.results.append(result)
        done = Future()
        done.set_result(True)
        return done

    def fail(self, claim, error, retry):
        self.errors.append(error)


@pytest.fixture
def blobs(tmp_path):
    return BlobStore(f"file://{tmp_path}/blobs")


def committed(blobs, credentials=None, prompt="ein Prompt", **fields):
    """The result of a drawn job and the bytes of its pictures."""
    pipeline, commits = FakePipeline(), Commits()
    held = claim(prompt, **fields)
    state = pipeline.prepare(held.spec)
    (images,) = pipeline.decode([state])
    output = Output(commits, blobs, "demo", "ab" * 32, credentials)
    output.submit(Decoded(ActiveJob(held, state, 0.0, 0.0), images))
    wait_until(lambda: not output.pending, what="the commit")
    output.stop()
    assert not commits.errors
    (result,) = commits.results
    return result, [blobs.get(image.path) for image in result.images]


def said(data):
    with Image.open(io.BytesIO(data)) as picture:
        return read_parameters(picture)


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_every_picture_of_a_job_says_how_it_was_made(blobs, name):
    result, files = committed(blobs, num_images=2, output_format=name)
    told = [json.loads(said(data)) for data in files]
    assert [each["seed"] for each in told] == [image.seed for image in result.images]
    assert {each["prompt"] for each in told} == {"ein Prompt"}
    assert {each["model_hash"] for each in told} == {"ab" * 32}
    assert result.warnings == ()
    again, same = committed(blobs, num_images=2, output_format=name)
    assert same == files
    assert [image.sha256 for image in again.images] == [image.sha256 for image in result.images]


@pytest.mark.parametrize("name", ["png", "jpeg", "webp"])
def test_a_request_may_want_its_picture_silent(blobs, name):
    _, (data,) = committed(blobs, embed_parameters=False, output_format=name)
    assert said(data) is None
    assert b"Prompt" not in data
    assert "Prompt".encode("utf-16-be") not in data


def test_parameters_that_a_format_cannot_hold_are_a_warning(blobs):
    long = "☂" * 33_000
    assert committed(blobs, prompt=long)[0].warnings == ()
    result, (data,) = committed(blobs, prompt=long, output_format="jpeg")
    assert said(data) is None
    (warning,) = result.warnings
    assert "too long for a jpeg file" in warning
    assert not committed(blobs, prompt=long, output_format="jpeg", embed_parameters=False)[
        0
    ].warnings


def test_with_a_certificate_every_picture_is_signed(blobs, tmp_path):
    files = make_signing(tmp_path)
    credentials = open_credentials(files.cert, files.key)
    _, signed = committed(blobs, credentials, num_images=2, output_format="webp")
    for data in signed:
        with c2pa.Reader("image/webp", io.BytesIO(data)) as reader:
            assert reader.get_validation_state() == "Valid"
        assert json.loads(said(data))["prompt"] == "ein Prompt"
    _, (silent,) = committed(blobs, credentials, embed_parameters=False)
    with c2pa.Reader("image/png", io.BytesIO(silent)) as reader:
        assert "ein Prompt" not in reader.json()
    assert b"ein Prompt" not in silent
