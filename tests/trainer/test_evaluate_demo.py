import io
import json
from collections.abc import Sequence

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from model import GenerationRequest
from trainer.demo.judge import Expected
from trainer.demo.prompts import TASKS, eval_prompts
from trainer.demo.render import render
from trainer.demo.scenes import FREE, PLAIN, Background, Scene, SceneObject
from trainer.evaluate.demo import evaluate_demo, write_report

POSITIONS = ((0.27, 0.27), (0.73, 0.73), (0.73, 0.27), (0.27, 0.73))
MOVES = {"left": (-1, 0), "right": (1, 0), "above": (0, -1), "below": (0, 1)}


class DrawingPipe:
    """A pipeline that draws each known prompt correctly, with a chosen task always blank."""

    def __init__(self, blank_task: str = "") -> None:
        self.requests: list[GenerationRequest] = []
        self.batches: list[int] = []
        self._prompts = {
            p.text: p for level in ("short", "detailed") for p in eval_prompts(level, per_task=3)
        }
        self._blank_task = blank_task

    def generate(self, requests: Sequence[GenerationRequest]) -> list[list[Image.Image]]:
        self.batches.append(len(requests))
        self.requests.extend(requests)
        return [[self._draw(request)] * request.num_images for request in requests]

    def _draw(self, request: GenerationRequest) -> Image.Image:
        prompt = self._prompts[request.prompt]
        assert request.width is not None
        assert request.height is not None
        if prompt.task == self._blank_task:
            return Image.new("RGB", (request.width, request.height), "white")
        return Image.fromarray(render(_scene_of(prompt.expected), request.width, request.height))


def _scene_of(expected: Expected) -> Scene:
    looks = [(g.shape, g.color or "red") for g in expected.groups for _ in range(g.count)]
    places = list(POSITIONS)
    if expected.relation is not None:
        right, down = MOVES[expected.relation]
        places = [(0.5 + 0.23 * right, 0.5 + 0.23 * down), (0.5 - 0.23 * right, 0.5 - 0.23 * down)]
    things = [
        SceneObject(shape, color, "medium", x, y, 0.16)
        for (shape, color), (x, y) in zip(looks, places, strict=False)
    ]
    return Scene(FREE, tuple(things), Background(PLAIN, (_ground(looks),)))


def _ground(looks: list[tuple[str, str]]) -> str:
    colors = {color for _, color in looks}
    if "white" not in colors:
        return "white"
    return "gray" if "black" in colors else "black"


def test_right_pictures_score_one():
    report = evaluate_demo(DrawingPipe(), 64, per_task=3, progress=False)
    assert report.overall() == 1.0, [item for item in report.scored if not item.correct]
    assert len(report.scored) == 2 * 3 * len(TASKS)
    assert report.levels == ["short", "detailed"]


def test_one_failing_task_costs_a_sixth():
    report = evaluate_demo(DrawingPipe(blank_task="counting"), 64, per_task=3, progress=False)
    assert report.score("counting") == 0.0
    assert report.overall() == pytest.approx(5 / 6)


def test_requests_are_batched_with_distinct_seeds_and_given_settings():
    pipe = DrawingPipe()
    evaluate_demo(
        pipe,
        (96, 64),
        per_task=2,
        num_images=2,
        batch_size=5,
        seed=100,
        settings={"num_inference_steps": 7},
        progress=False,
    )
    assert pipe.batches == [5, 5, 5, 5, 4]
    assert [request.seed for request in pipe.requests] == list(range(100, 148, 2))
    assert {(r.width, r.height, r.num_inference_steps) for r in pipe.requests} == {(96, 64, 7)}


def test_limit_spreads_over_tasks():
    report = evaluate_demo(DrawingPipe(), 64, limit=12, progress=False)
    assert len(report.scored) == 12
    assert {item.task for item in report.scored} == set(TASKS)
    with pytest.raises(ValueError, match="limit is 5"):
        evaluate_demo(DrawingPipe(), 64, limit=5, progress=False)


def test_report_files_and_table(tmp_path):
    report = evaluate_demo(DrawingPipe(), 64, per_task=2, progress=False)
    write_report(report, tmp_path / "out")
    data = json.loads((tmp_path / "out" / "demo.json").read_text(encoding="utf-8"))
    assert data["overall"] == 1.0
    assert set(data["tasks"]) == set(TASKS)
    assert len(data["pictures"]) == data["num_pictures"] == 24
    sheet = np.asarray(Image.open(tmp_path / "out" / "demo.png"))
    assert sheet.std() > 10
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(report.table())
    assert "color_attribution" in console.export_text()
