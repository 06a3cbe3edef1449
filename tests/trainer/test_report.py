import json
import math
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from PIL import Image

from trainer.metrics import METRICS, forget_after, read_metrics
from trainer.previews import grid
from trainer.report import POINTS, svg_plot, write_report

SVG = "{http://www.w3.org/2000/svg}"


def write_rows(folder, rows) -> None:
    (folder / METRICS).write_text("".join(json.dumps(row) + "\n" for row in rows))


def points(path) -> list[list[tuple[float, float]]]:
    lines = ElementTree.parse(path).getroot().iter(f"{SVG}polyline")
    return [[tuple(map(float, p.split(","))) for p in line.get("points").split()] for line in lines]


def test_the_report_shows_what_was_measured(tmp_path):
    rows = [
        {"step": i, "images_per_s": 10.0, "loss": 2.0 - i / 1000, "grad_norm": 1.0, "lr": 1e-4}
        for i in range(1, 1001)
    ]
    rows[500]["loss"] = math.nan
    rows[-1]["skipped"] = 1
    write_rows(tmp_path, rows)
    (tmp_path / "previews").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "previews" / "step-00000500.png")
    write_report(tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert "| steps | 1000 |" in text
    assert "| mean loss of the first tenth of the steps | 1.9495 |" in text
    assert "| mean loss of the last tenth of the steps | 1.0495 |" in text
    assert "| steps skipped | 1 |" in text
    images = re.findall(r"!\[.*?\]\((.*?)\)", text)
    assert len(images) == 5
    assert all((tmp_path / image).is_file() for image in images)
    (curve,) = points(tmp_path / "plot-loss.svg")
    assert len(curve) <= POINTS
    across, down = zip(*curve, strict=True)
    assert list(across) == sorted(across)
    assert list(down) == sorted(down), "a falling loss goes down the page"


def test_a_flat_curve_and_a_name_with_markup_can_be_drawn():
    root = ElementTree.fromstring(svg_plot("a < b", {"x & y": [(1, 3.0), (2, 3.0)]}))
    texts = [element.text for element in root.iter(f"{SVG}text")]
    assert "a < b" in texts
    assert "x & y" in texts


def test_nothing_measured_is_no_report(tmp_path):
    write_report(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("step", [0, 2, 9])
def test_lines_of_later_steps_are_forgotten(tmp_path, step):
    write_rows(tmp_path, [{"step": i} for i in range(1, 5)])
    with (tmp_path / METRICS).open("a") as file:
        file.write('{"step": 5')
    forget_after(tmp_path / METRICS, step)
    found = [row["step"] for row in read_metrics(tmp_path / METRICS)]
    assert found == [i for i in range(1, 5) if i <= step]
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_previews_are_laid_out_in_rows():
    images = [Image.new("RGB", (4, 2), (i, i, i)) for i in range(6)]
    sheet = np.asarray(grid(images))
    assert sheet.shape == (4, 16, 3)
    assert (sheet[0, 3, 0], sheet[0, 4, 0], sheet[2, 4, 0], sheet[2, 8, 0]) == (0, 1, 5, 255)
