"""The table of evaluations in docs/model.md, counted while the pipeline runs."""

import re
from pathlib import Path

import pytest

from model import GenerationRequest
from model.request import check_settings

DOCUMENT = Path(__file__).parents[2] / "docs" / "model.md"
# | setting | `field=value ...` | guided of evaluations | nfe of full nfe | saving |
ROW = re.compile(
    r"^\| [^|]+ \| `([^`|]*)` \| (\d+) of (\d+) \| (\d+) of (\d+) \| ([\d.]+)x \|$", re.MULTILINE
)
# As measured with the two codebases themselves; the document may list more.
PUBLISHED = {(33, 49, 82), (23, 34, 57), (14, 20, 34), (12, 50, 62), (33, 50, 83), (0, 4, 4)}


def value_of(text):
    """A field's value as the table writes it."""
    try:
        number = float(text)
    except ValueError:
        return text
    return int(number) if text.isdigit() else number


def rows():
    found = ROW.findall(DOCUMENT.read_text(encoding="utf-8"))
    for settings, *counts, saving in found:
        fields = dict(part.split("=") for part in settings.split())
        yield {name: value_of(text) for name, text in fields.items()}, counts, saving


def test_the_document_has_every_published_row():
    listed = {(int(g), int(e), int(n)) for _, (g, e, n, _), _ in rows()}
    assert listed >= PUBLISHED
    for settings, _, _ in rows():
        check_settings({name: value for name, value in settings.items() if name != "preset"})


@pytest.mark.slow
def test_the_table_is_what_the_pipeline_does(pipeline):
    table = list(rows())
    size = {"width": 16, "height": 16, "shift": 6.0}
    states = [
        pipeline.prepare(GenerationRequest("a", seed=1, **(size | settings)))
        for settings, _, _ in table
    ]
    while running := [state for state in states if not state.finished]:
        pipeline.denoise_step(running)
    for state, (settings, counts, saving) in zip(states, table, strict=True):
        steps, cfg, nfe = state.steps_computed, state.steps_cfg, state.nfe
        assert [cfg, steps, nfe, 2 * steps] == [int(count) for count in counts], settings
        assert f"{2 * steps / nfe:.2f}" == saving, settings
