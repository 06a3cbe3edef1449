"""``report.md`` of a training stage: figures and curves, as SVG files beside it."""

import os
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from trainer.metrics import METRICS, read_metrics

PLOTS = {
    "loss": ("loss", "loss_velocity", "loss_auxiliary"),
    "gradient norm": ("grad_norm",),
    "learning rate": ("lr",),
    "loss by timestep": tuple(f"loss_t{tenth}" for tenth in range(0, 10, 3)),
    "images per second": ("images_per_s",),
}
WIDTH, HEIGHT, MARGIN = 640, 240, 48
POINTS = 200  # of a curve; each is the mean of the steps around it
COLORS = ("#1b6ac9", "#c9541b", "#2b8a3e", "#862e9c")


def write_report(stage: Path) -> None:
    """Write the report of what a stage's ``metrics.jsonl`` holds; nothing without any."""
    rows = read_metrics(stage / METRICS)
    if not rows:
        return
    last = rows[-1]
    lines = [f"# {stage.name}", "", "| | |", "|---|---|"]
    lines.append(f"| steps | {last['step']} |")
    tenth = max(1, len(rows) // 10)
    for name, part in (("first", rows[:tenth]), ("last", rows[-tenth:])):
        mean = sum(row["loss"] for row in part) / len(part)
        lines.append(f"| mean loss of the {name} tenth of the steps | {mean:.4f} |")
    lines.append(f"| images per second at the end | {last['images_per_s']} |")
    lines.append(f"| steps skipped | {int(last.get('skipped', 0))} |")
    for title, keys in PLOTS.items():
        curves = {key: _curve(rows, key) for key in keys}
        curves = {key: points for key, points in curves.items() if len(points) > 1}
        if curves:
            file = f"plot-{title.replace(' ', '-')}.svg"
            _write(stage / file, svg_plot(title, curves))
            lines += ["", f"## {title.capitalize()}", "", f"![{title}]({file})"]
    pictures = sorted((stage / "previews").glob("*.png"))
    if pictures:
        lines += ["", "## Previews", ""]
        lines += [f"![{p.stem}](previews/{p.name})" for p in pictures[-4:]]
    _write(stage / "report.md", "\n".join(lines) + "\n")


def svg_plot(title: str, curves: Mapping[str, Sequence[tuple[float, float]]]) -> str:
    """Lines over steps, as an SVG document; the vertical axis covers what there is.

    Args:
        title: above the plot.
        curves: points (step, value) by name, two at least each.
    """
    steps = [x for points in curves.values() for x, _ in points]
    values = [y for points in curves.values() for _, y in points]
    low, high = min(values), max(values)
    high = high if high > low else low + max(abs(low), 1.0) * 0.1
    left, right = min(steps), max(max(steps), min(steps) + 1)

    def place(x: float, y: float) -> str:
        across = MARGIN + (x - left) / (right - left) * (WIDTH - 2 * MARGIN)
        down = HEIGHT - MARGIN - (y - low) / (high - low) * (HEIGHT - 2 * MARGIN)
        return f"{across:.1f},{down:.1f}"

    text = '<text x="{}" y="{}" font-size="12" fill="{}">{}</text>'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" '
        'font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<path d="M{MARGIN} {MARGIN}V{HEIGHT - MARGIN}H{WIDTH - MARGIN}" fill="none" '
        'stroke="#888"/>',
        text.format(MARGIN, 18, "#222", escape(title)),
        text.format(2, MARGIN, "#444", f"{high:.3g}"),
        text.format(2, HEIGHT - MARGIN, "#444", f"{low:.3g}"),
        text.format(MARGIN, HEIGHT - 28, "#444", f"{left:g}"),
        text.format(WIDTH - MARGIN - 30, HEIGHT - 28, "#444", f"{right:g}"),
    ]
    for number, (name, points) in enumerate(curves.items()):
        color = COLORS[number % len(COLORS)]
        path = " ".join(place(x, y) for x, y in points)
        parts.append(f'<polyline points="{path}" fill="none" stroke="{color}"/>')
        parts.append(text.format(MARGIN + 150 * number, HEIGHT - 8, color, escape(name)))
    return "\n".join([*parts, "</svg>"]) + "\n"


def _curve(rows: Sequence[dict[str, Any]], key: str) -> list[tuple[float, float]]:
    """Means of neighbouring steps, POINTS at most."""
    found = [(row["step"], row[key]) for row in rows if key in row]
    found = [(x, y) for x, y in found if abs(y) < float("inf")]  # neither infinite nor no number
    size = -(-len(found) // POINTS) or 1
    groups = [found[i : i + size] for i in range(0, len(found), size)]
    return [
        (sum(x for x, _ in group) / len(group), sum(y for _, y in group) / len(group))
        for group in groups
    ]


def _write(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)
