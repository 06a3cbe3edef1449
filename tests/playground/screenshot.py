"""`make screenshot`: draws docs/images/playground.png, the playground as README shows it.

    python -m tests.playground.screenshot [FOLDER]

With a FOLDER it also draws there what else a reviewer looks at: dark, on a phone, a comparison.
The pictures' seeds are the first whose drawing the judge accepts. For the Chinese and Japanese
labels the machine needs a font, such as Debian's fonts-noto-cjk.
"""

import io
import sys
import tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from tests.integration.test_serve_demo import post_for_png
from tests.playground.helpers import DEMO, FLAGS, Visit, draw, find_chromium, set_prompt, wait_text
from tests.server.embedded.test_service import Service
from trainer.demo.judge import Expected, ExpectedGroup, judge

TARGET = DEMO.parents[1] / "docs" / "images" / "playground.png"
DESKTOP = {"viewport": {"width": 1240, "height": 925}, "device_scale_factor": 1.25}
PHONE = {"viewport": {"width": 360, "height": 740}, "device_scale_factor": 2}
SEEDS = range(40)
SCENES = [
    ("a green cross", [(1, "cross", "green")]),
    ("two blue circles", [(2, "circle", "blue")]),
    ("a purple diamond", [(1, "diamond", "purple")]),
    ("an orange star", [(1, "star", "orange")]),
    ("four cyan squares", [(4, "square", "cyan")]),
    ("three yellow stars", [(3, "star", "yellow")]),
]


def right_seed(service, prompt, groups):
    """The first seed whose picture is right, or the first of all."""
    expected = Expected(tuple(ExpectedGroup(*group) for group in groups))
    for seed in SEEDS:
        picture, _ = post_for_png(service, {"prompt": prompt, "seed": seed})
        if judge(np.asarray(picture), expected).correct:
            return seed
    return SEEDS[0]


def save(page, path, **options):
    """A screenshot as a PNG that is as small as it can be without loss."""
    picture = Image.open(io.BytesIO(page.screenshot(**options))).convert("RGB")
    picture.save(path, optimize=True)
    print(f"{path}: {path.stat().st_size / 1000:.0f} kB")


def open_page(browser, service, seeds, **options):
    """The page after the scenes have been drawn, at rest."""
    page = Visit(browser, service, **options).page
    for prompt, seed in seeds.items():
        draw(page, prompt, seed=seed)
    wait_text(page, "#service-line", "ready$")
    page.focus("#generate")
    page.evaluate("document.activeElement.blur()")
    return page


def draw_others(browser, service, seeds, folder):
    """What a reviewer looks at besides."""
    last = dict(list(seeds.items())[-1:])
    page = open_page(browser, service, seeds, color_scheme="dark", **DESKTOP)
    save(page, folder / "dark.png")
    save(open_page(browser, service, last, **PHONE), folder / "phone.png", full_page=True)
    for name, scheme in (("compare", "light"), ("compare-dark", "dark")):
        page = Visit(browser, service, color_scheme=scheme, **DESKTOP).page
        page.locator("#mode label", has_text="Compare").click()
        ((prompt, seed),) = last.items()
        set_prompt(page, prompt, seed=seed)
        page.click("#generate")
        page.wait_for_selector("#report table")
        save(page, folder / f"{name}.png")


def main():
    """Start a service, draw, end it."""
    chromium = find_chromium()
    if chromium is None:
        raise SystemExit("screenshot: no Chromium was found (install the package chromium)")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as playwright:
        service = Service(DEMO, Path(folder) / "data")
        try:
            service.wait_ready()
            seeds = {prompt: right_seed(service, prompt, groups) for prompt, groups in SCENES}
            browser = playwright.chromium.launch(executable_path=chromium, args=FLAGS)
            save(open_page(browser, service, seeds, color_scheme="light", **DESKTOP), TARGET)
            if len(sys.argv) > 1:
                draw_others(browser, service, seeds, Path(sys.argv[1]))
            browser.close()
        finally:
            service.process.terminate()
            service.process.wait(40)
            service.end()


if __name__ == "__main__":
    main()
