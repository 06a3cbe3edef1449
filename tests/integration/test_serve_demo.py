"""A prompt over HTTP, through Redis, to a worker, to a right picture of the bundled checkpoint."""

from __future__ import annotations

import http.client
import io
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from model import GenerationRequest, load_pipeline
from tests.model.conftest import max_difference
from trainer.demo.judge import Expected, ExpectedGroup, judge

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
PROMPT = "three yellow stars"
EXPECTED = Expected((ExpectedGroup(3, "star", "yellow"),))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


@pytest.fixture
def service(demo_service):
    return demo_service


def post_for_png(service, body):
    """The picture of a synchronous call."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=100)
    headers = {"content-type": "application/json", "accept": "image/png"}
    connection.request("POST", "/generate", json.dumps(body), headers)
    response = connection.getresponse()
    data = response.read()
    connection.close()
    assert response.status == 200, data
    return Image.open(io.BytesIO(data)), data


def test_a_prompt_gives_a_right_picture_most_of_the_time(service):
    right = 0
    for seed in range(5):
        picture, _ = post_for_png(service, {"prompt": PROMPT, "seed": seed})
        right += judge(np.asarray(picture), EXPECTED).correct
    assert right >= 3


def test_equal_requests_give_equal_bytes_and_a_crowd_changes_nothing_visible(service):
    bodies = [
        {"prompt": PROMPT, "seed": 7},
        {"prompt": "a red circle above a blue square", "seed": 8, "width": 128, "height": 128},
        {"prompt": "a green cross", "seed": 9, "num_inference_steps": 9, "guidance_scale": 1.0},
        {"prompt": "two cyan squares", "seed": 10, "width": 64, "height": 112},
        {"prompt": PROMPT, "seed": 7},
    ]
    pictures: dict[int, tuple[Image.Image, bytes]] = {}

    def draw(place):
        pictures[place] = post_for_png(service, bodies[place])

    threads = [threading.Thread(target=draw, args=(place,)) for place in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(100)
    pipeline = load_pipeline(DEMO)
    for place, body in enumerate(bodies):
        alone = pipeline.generate([GenerationRequest(**body)])[0][0]
        assert max_difference(pictures[place][0], alone) <= 1, body
    # Undisturbed, the same request gives the same bytes: no time, no id in the file.
    assert post_for_png(service, bodies[0])[1] == post_for_png(service, bodies[0])[1]


def test_steps_are_skipped_where_asked(service):
    body = {"prompt": PROMPT, "seed": 7, "num_inference_steps": 12}
    static = service.call("POST", "/generate", body | {"cache": "balanced"})
    assert static["warnings"] == []
    assert static["steps"]["skipped"] > 0
    assert static["steps"]["computed"] + static["steps"]["skipped"] == static["total"] == 12
    assert static["steps"]["nfe"] == 2 * static["steps"]["computed"]
    assert static["cache_decisions"] is None
    dynamic = service.call("POST", "/generate", body | {"cache": 0.2})
    assert set(dynamic["cache_decisions"]) == {"0/cond", "0/uncond"}
    for letters in dynamic["cache_decisions"].values():
        assert len(letters) == 12
        assert letters[0] == letters[-1] == "1"
    assert sum(s.count("1") for s in dynamic["cache_decisions"].values()) == dynamic["steps"]["nfe"]


def test_bad_requests_leave_the_service_working(service):
    for body in ({"prompt": ""}, {"prompt": "x", "width": 63}, {"promt": "x"}):
        assert service.call("POST", "/generate", body)["status"] in (400, 422)
    answer = service.call("POST", "/generate", {"prompt": PROMPT, "seed": 1})
    assert answer["status"] == "succeeded"
    assert answer["images"][0]["width"] == load_pipeline(DEMO).generation_config.defaults["width"]
