"""A prompt over HTTP, through Redis, to a worker, to a right picture of the bundled checkpoint."""

from __future__ import annotations

import base64
import http.client
import io
import itertools
import json
import threading
from pathlib import Path

import numpy as np
import pytest
from openai import OpenAI
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


def test_an_openai_stream_shows_the_picture_in_the_making(service):
    """True partial pictures: none is another or the final one."""
    with OpenAI(base_url=f"http://127.0.0.1:{service.port}/v1", api_key="any") as client:
        stream = client.images.generate(
            prompt=PROMPT, size="64x64", n=2, stream=True, partial_images=3,
            extra_body={"seed": 7},
        )  # fmt: skip
        events = list(stream)
    pictures = {}
    for event in events:
        with Image.open(io.BytesIO(base64.b64decode(event.b64_json))) as opened:
            assert (opened.format, opened.size) == ("PNG", (64, 64))
            pixels = np.asarray(opened.convert("RGB"), dtype=np.float64)
        place = getattr(event, "partial_image_index", "final")
        pictures[event.image_index, place] = pixels
    assert len(events) == len(pictures) == 2 * (3 + 1)
    for image in range(2):
        shown = [pictures[image, place] for place in (0, 1, 2, "final")]
        for one, other in itertools.combinations(shown, 2):
            assert np.abs(one - other).mean() > 0.5
    # The last event has the very picture that a plain call gets.
    plain, _ = post_for_png(
        service, {"prompt": PROMPT, "seed": 8, "width": 64, "height": 64, "num_images": 1}
    )
    assert max_difference(Image.fromarray(pictures[1, "final"].astype(np.uint8)), plain) <= 1


def test_a_watcher_sees_previews_of_a_running_job(service):
    body = {"prompt": PROMPT, "seed": 3, "width": 128, "height": 128, "num_inference_steps": 50}
    job = service.call("POST", "/generate", body, prefer="respond-async")
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=100)
    connection.request("GET", f"/jobs/{job['id']}/events")
    text = connection.getresponse().read().decode()
    connection.close()
    events = [
        dict(line.split(": ", 1) for line in block.split("\n") if not line.startswith(":"))
        for block in text.strip().split("\n\n")
    ]
    kinds = [event["event"] for event in events if "event" in event]
    assert {"queued", "started", "progress", "preview"} <= set(kinds)
    assert [kind for kind in kinds if kind in ("succeeded", "failed")] == kinds[-1:]
    previews = [json.loads(event["data"]) for event in events if event.get("event") == "preview"]
    for preview in previews:
        data = base64.b64decode(preview["b64_json"])
        assert preview["media_type"] == "image/jpeg"
        assert len(data) <= 64 * 1024
        assert Image.open(io.BytesIO(data)).size == (256, 256)
    assert json.loads(events[-1]["data"])["images"]


def test_bad_requests_leave_the_service_working(service):
    for body in ({"prompt": ""}, {"prompt": "x", "width": 63}, {"promt": "x"}):
        assert service.call("POST", "/generate", body)["status"] in (400, 422)
    answer = service.call("POST", "/generate", {"prompt": PROMPT, "seed": 1})
    assert answer["status"] == "succeeded"
    assert answer["images"][0]["width"] == load_pipeline(DEMO).generation_config.defaults["width"]
