"""What browser tests and the screenshot share: where the browser is, and a visit of the page."""

import re
import shutil
from pathlib import Path

from playwright.sync_api import expect

DEMO = Path(__file__).parents[2] / "checkpoints" / "demo"
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-background-networking",
]
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
PATIENCE_MS = 90_000  # of a machine that is busy with other things
LONG = {"num_inference_steps": 50, "width": 128, "height": 128, "num_images": 8}


def find_chromium():
    """Path of a Chromium on this machine, or None."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Visit:
    """One browser profile with the page open; collects complaints and requests to elsewhere.

    `expected` are parts of console messages that a test provokes.
    """

    def __init__(self, browser, service, *, expected=(), path="/", **options):
        self.origin = f"http://127.0.0.1:{service.port}"
        self.complaints, self.foreign = [], []
        self._expected = expected
        self.context = browser.new_context(**options)
        self.context.set_default_timeout(PATIENCE_MS)
        self.page = self.context.new_page()
        self.page.on("console", self._on_console)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("request", self._on_request)
        self.page.goto(self.origin + path)
        self.wait_offer()

    def wait_offer(self):
        """Wait until the page has learnt what the model offers."""
        self.page.wait_for_selector("#num_images option", state="attached")

    def _on_console(self, message):
        known = any(part in message.text for part in self._expected)
        if message.type in ("error", "warning") and not known:
            self.complaints.append(message.text)

    def _on_request(self, request):
        if not request.url.startswith((self.origin, "data:")):
            self.foreign.append(request.url)


def wait_text(page, selector, pattern):
    """Wait until an element's text has the pattern. (The page's policy forbids evaluated code.)"""
    expect(page.locator(selector)).to_have_text(re.compile(pattern), timeout=PATIENCE_MS)


def set_prompt(page, prompt, **settings):
    """Fill in the prompt and other fields by their element ids."""
    page.fill("#prompt", prompt)
    for name, value in settings.items():
        if page.evaluate("id => document.getElementById(id).tagName", name) == "SELECT":
            page.select_option(f"#{name}", str(value))
        else:
            page.fill(f"#{name}", str(value))


def draw(page, prompt, **settings):
    """Generate a picture and wait for it; returns its fact sheet as {name: value}."""
    set_prompt(page, prompt, **settings)
    page.click("#generate")
    wait_done(page)
    return facts(page)


def wait_done(page):
    """Wait until what goes on has ended and its picture is there."""
    page.wait_for_selector("#frame .pictures img, #frame .compared img")
    page.wait_for_selector("#cancel", state="hidden")


def facts(page):
    """The fact sheet of the picture on stage."""
    return page.evaluate(
        "() => Object.fromEntries([...document.querySelectorAll('#report .facts div')]"
        ".map(row => [row.querySelector('dt').textContent, row.querySelector('dd').textContent]))"
    )


def entries(page):
    """Accessible names of the history's entries, the newest first."""
    return page.eval_on_selector_all(
        "#history-list .entry", "nodes => nodes.map(node => node.ariaLabel)"
    )
