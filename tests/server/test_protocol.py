import time

import pytest

from server.protocol import (
    ImageRef,
    JobResult,
    JobSpec,
    ProtocolError,
    StepCounts,
    Timings,
    is_job_id,
    is_name,
    new_job_id,
)


def test_messages_survive_json():
    spec = JobSpec(
        prompt='ein "rotes" Quadrat ☂',
        seed=2**53 - 9,
        metadata={"a": [1, None]},
        sigmas=[1.0, 0.5],
        panel={"content": "edge map"},
        negative_template=True,
    )
    assert JobSpec.from_json(spec.to_json()) == spec
    image = ImageRef(path="p", sha256="0", width=16, height=16, seed=1, format="png")
    timings = Timings(queue_s=1, encode_s=2, denoise_s=3, decode_s=4, store_s=5, total_s=15)
    steps = StepCounts(computed=1, skipped=2, cfg=1)
    result = JobResult(images=(image,), timings=timings, steps=steps, warnings=("w",), model="m")
    assert JobResult.from_json(result.to_json()) == result


def test_results_of_an_older_worker_can_be_read():
    text = '{"computed":3,"skipped":0,"cfg":2}'
    assert StepCounts.from_json(text) == StepCounts(computed=3, skipped=0, cfg=2, nfe=0)


def test_fields_of_a_newer_writer_are_ignored():
    assert JobSpec.from_json('{"prompt":"p","seed":1,"colour_space":"p3"}').prompt == "p"


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "JobSpec"),
        ('{"prompt":"p"}', "seed"),
        ('{"prompt":"p","seed":"x"}', "seed"),
        ('{"prompt":"p","seed":1,"version":2}', "version 2 is newer"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(text, complaint):
    with pytest.raises(ProtocolError, match=complaint) as caught:
        JobSpec.from_json(text)
    assert "\n" not in str(caught.value)


def test_job_ids_are_unique_sortable_and_recognised():
    early = {new_job_id() for _ in range(1000)}
    time.sleep(0.002)
    late = new_job_id()
    assert len(early) == 1000
    assert all(is_job_id(job_id) and job_id < late for job_id in early)


@pytest.mark.parametrize("text", ["", "..", "a" * 26 + "\n", "A" * 26, "i" * 26, "1" * 25, "*"])
def test_other_text_is_no_job_id(text):
    assert not is_job_id(text)


@pytest.mark.parametrize(
    ("text", "good"),
    [("anonymous", True), ("a.b-c_1", True), ("", False), ("a:b", False), ("..", False),
     ("a/b", False), ("a" * 65, False), ("a\n", False)],
)  # fmt: skip
def test_names(text, good):
    assert is_name(text) is good
