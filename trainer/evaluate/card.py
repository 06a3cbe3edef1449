"""The model card: what a checkpoint is, how it was made, and what it scored."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from model.checkpoint import read_json, write_manifest
from trainer.demo.prompts import TASKS
from trainer.evaluate.demo import DemoReport

CARD = """\
---
license: apache-2.0
pipeline_tag: text-to-image
library_name: diffusers
---

# lumina-serve demo checkpoint

A small member of the Lumina-Image 2.0 family (Unified Next-DiT, Gemma-2 text encoder, 16-channel
8x autoencoder) trained from nothing on a procedural world: circles, squares, triangles, stars,
diamonds and crosses in ten colours on plain or patterned grounds. It exists so that the server can
be tried, tested and scored without any download. Prompts outside that world give nonsense.

| part | parameters |
|---|---|
{parts}

Made by `trainer train {recipe}`; weights are the {weights}. English captions only. Runs that led
here, the last one first:

{runs}

## Scores

`trainer evaluate` on held-out prompts, judged exactly (every object's shape and colour, their
number and relation; nothing else may be in the picture). Share of right pictures, default settings
({settings}); a task has 100 pictures, so a standard error of up to 0.05.

{tables}

## Use

```python
from model import GenerationRequest, load_pipeline

pipeline = load_pipeline("checkpoints/demo")
request = GenerationRequest("a red circle above a blue square", seed=1)
pipeline.generate([request])[0][0].save("a.png")
```

diffusers' `Lumina2Pipeline.from_pretrained` loads the same folder.

## Limits

Scenes of several different objects fail first. Shapes are upright and never overlap. The service
accepts {min_size} to {max_size} pixels; trained were only the sizes in the table. Text, faces and
real things do not exist here.
"""


def write_card(checkpoint: Path, reports: Sequence[DemoReport]) -> None:
    """Write README.md and the scores into a checkpoint folder, and renew its manifest."""
    manifest = read_json(checkpoint / "manifest.json")
    manifest.pop("files", None)
    generation = read_json(checkpoint / "generation_config.json")
    defaults, limits = generation["defaults"], generation["limits"]
    text = CARD.format(
        parts="\n".join(f"| {name} | {count / 1e6:.2f} M |" for name, count in _parts(checkpoint)),
        recipe=manifest["recipe"],
        runs="\n".join(_lineage(manifest)),
        weights=manifest["weights"],
        settings=", ".join(
            f"{defaults[name]} {label}"
            for name, label in (("num_inference_steps", "steps"), ("guidance_scale", "guidance"))
        ),
        tables="\n\n".join(markdown_table(report) for report in reports),
        min_size=limits["min_size"],
        max_size=limits["max_size"],
    )
    (checkpoint / "README.md").write_text(text, encoding="utf-8")
    scores = {f"{r.width}x{r.height}": _scores(r) for r in reports}
    write_manifest(checkpoint, {**manifest, "scores": scores})


def markdown_table(report: DemoReport) -> str:
    """Tasks by caption levels, as GitHub renders it."""
    levels = report.levels
    lines = [
        f"| {report.width}x{report.height} | {' | '.join(levels)} | all |",
        "|---|" + "---|" * (len(levels) + 1),
    ]
    for task in TASKS:
        row = [f"{report.score(task, level):.3f}" for level in levels]
        lines.append(f"| {task} | {' | '.join(row)} | {report.score(task):.3f} |")
    row = [f"{report.overall(level):.3f}" for level in levels]
    lines.append(f"| **overall** | {' | '.join(row)} | **{report.overall():.3f}** |")
    return "\n".join(lines)


def _lineage(manifest: Mapping[str, Any] | None) -> list[str]:
    """A line for the run and for each run it started from: recipe, code, seed, steps, remark."""
    lines = []
    while manifest:
        stages = ", ".join(f"{name} {steps}" for name, steps in manifest["stages"].items())
        remark = f"; {manifest['remark']}" if "remark" in manifest else ""
        lines.append(
            f"- recipe sha256 `{manifest['recipe_sha256'][:12]}`, git "
            f"`{manifest['git_revision'][:12]}`, seed {manifest['seed']}; steps: {stages}{remark}"
        )
        manifest = manifest.get("started_from")
    return lines


def _scores(report: DemoReport) -> dict[str, Any]:
    scores = {task: round(report.score(task), 4) for task in TASKS}
    return {"overall": round(report.overall(), 4), "pictures": len(report.scored), **scores}


def _parts(checkpoint: Path) -> list[tuple[str, int]]:
    """Weights in each part, counted from the file headers."""
    from safetensors import safe_open

    counts = []
    for part in ("transformer", "text_encoder", "vae"):
        total = 0
        for path in sorted((checkpoint / part).glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                for key in file.keys():  # noqa: SIM118
                    size = 1
                    for side in file.get_slice(key).get_shape():
                        size *= side
                    total += size
        counts.append((part, total))
    return counts
