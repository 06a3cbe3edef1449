"""A picture from the page: asked for, watched, canceled, refused, kept."""

import hashlib
import re
import subprocess
import sys
from urllib.request import urlopen

import pytest
from playwright.sync_api import expect

from tests.playground.helpers import (
    LONG,
    PATIENCE_MS,
    draw,
    entries,
    facts,
    set_prompt,
    wait_done,
    wait_text,
)

PROMPT = "three yellow stars"
AWKWARD = """it's <b>"bold"</b> $HOME `id` \\ 一个红色圆形 <img src=x onerror=alert(1)>"""


def natural_size(page, selector="#frame .pictures img"):
    return page.eval_on_selector(selector, "image => [image.naturalWidth, image.naturalHeight]")


def test_a_picture_with_its_figures(page):
    sheet = draw(page, PROMPT, seed=7, num_inference_steps=12)
    assert natural_size(page) == [64, 64]
    assert sheet["seed"] == "7"
    assert sheet["steps"] == "12 computed"
    assert sheet["evaluations"] == "24"
    assert sheet["model"] == "demo"
    assert page.get_attribute("#frame .pictures img", "alt") == PROMPT
    assert "denoise" in page.text_content("#report .legend")
    assert page.text_content("#spoken") == "Done. The picture is here."
    with page.expect_download() as download:
        page.get_by_role("link", name="Download", exact=True).click()
    assert download.value.suggested_filename == "lumina-7.png"


def test_every_setting_reaches_the_job(page):
    page.click("#more summary")
    page.click("[data-ratio='16:9']")
    page.locator("#cache label", has_text="balanced").click()
    with page.expect_request("**/generate") as sent:
        draw(
            page, PROMPT, seed=9, num_images=2, num_inference_steps=9, guidance_scale=2.5,
            negative_prompt="red", template="base", sampler="dpm", shift=2, output_format="webp",
            quality=80,
        )  # fmt: skip
    body = sent.value.post_data_json
    size = (body.pop("width"), body.pop("height"))
    assert size in ((112, 64), (128, 64), (128, 80))
    assert body == {
        "prompt": PROMPT, "seed": 9, "num_images": 2, "num_inference_steps": 9,
        "guidance_scale": 2.5, "negative_prompt": "red", "system_prompt": "base",
        "sampler": "dpm", "shift": 2, "output_format": "webp", "quality": 80, "cache": "balanced",
    }  # fmt: skip
    assert page.locator("#frame .pictures img").count() == 2
    assert natural_size(page) == list(size)
    assert "skipped" in facts(page)["steps"]


def test_a_job_is_watched_while_it_waits_and_runs(page, service):
    blocker = service.call("POST", "/generate", {"prompt": "x", **LONG}, prefer="respond-async")
    set_prompt(page, PROMPT, num_images=3, num_inference_steps=50, width=128, height=128)
    page.click("#generate")
    wait_text(page, "#status", r"queue|ahead")
    wait_text(page, "#service-line", r"[1-9] jobs?$")
    page.click("#service summary")
    expect(page.locator("#open-jobs li")).to_have_count(2, timeout=PATIENCE_MS)
    page.get_by_role("button", name=f"Cancel job …{blocker['id'][-8:]}").click()
    wait_text(page, "#status", r"^Step [1-9]\d* of 50")
    assert page.eval_on_selector("#bar", "bar => bar.max") == 50
    page.wait_for_selector("#frame .preview img[src^='data:image/jpeg']")
    wait_done(page)
    assert page.is_hidden("#progress")


@pytest.mark.parametrize("how", ["button", "key"])
def test_cancel(page, service, how):
    set_prompt(page, PROMPT, **LONG)
    page.click("#generate")
    wait_text(page, "#status", r"^Step")
    if how == "button":
        page.click("#cancel")
    else:
        page.keyboard.press("Escape")
    page.wait_for_selector("#cancel", state="hidden")
    assert page.text_content("#alert") == "Canceled."
    job = page.evaluate("JSON.parse(localStorage['lumina.history'])[0]")
    assert job["status"] == service.call("GET", f"/jobs/{job['id']}")["status"] == "canceled"
    assert entries(page)[0].endswith(", canceled")
    assert page.is_enabled("#generate")


def test_a_problem_stands_at_its_field(visit):
    page = visit(expected=("422",)).page
    set_prompt(page, PROMPT, width=63)
    page.click("#generate")
    page.wait_for_selector("#width-problem")
    sentence = page.text_content("#width-problem")
    assert sentence == "width must be a whole number of pixels, a multiple of 16, got 63"
    assert page.get_attribute("#width", "aria-invalid") == "true"
    assert page.get_attribute("#width", "aria-describedby") == "width-problem"
    assert page.evaluate("document.activeElement.id") == "width"
    assert "appears here" in page.text_content("#frame")  # the stage is as it was
    # One inside the folded part opens it.
    page.click("#more summary")
    set_prompt(page, PROMPT, width=64, quality=101)
    page.click("#more summary")
    page.click("#generate")
    page.wait_for_selector("#quality-problem")
    assert page.locator("#width-problem").count() == 0
    assert page.evaluate("document.activeElement.id") == "quality"
    page.fill("#quality", "")
    page.fill("#prompt", " ")
    page.click("#generate")
    page.wait_for_selector("#prompt-problem")
    assert "not blank" in page.text_content("#prompt-problem")


def test_an_unreachable_service_is_said_and_survived(visit):
    page = visit(expected=("ERR_INTERNET_DISCONNECTED",)).page
    page.context.set_offline(True)
    set_prompt(page, PROMPT)
    page.click("#generate")
    wait_text(page, "#alert", "^The service cannot be reached.$")
    page.context.set_offline(False)
    draw(page, PROMPT, seed=1, num_inference_steps=4)
    assert page.is_hidden("#alert")


def test_the_history_survives_a_reload_and_restores_settings(visit):
    one = visit(expected=("404",))
    page = one.page
    draw(page, PROMPT, seed=7, num_inference_steps=5)
    draw(page, "a green cross", seed=3, num_inference_steps=6)
    page.reload()
    one.wait_offer()
    assert entries(page) == ["a green cross, seed 3", f"{PROMPT}, seed 7"]
    page.click("#history-list .entry >> nth=1")
    page.wait_for_selector("#frame .pictures img")
    assert page.input_value("#prompt") == PROMPT
    assert page.input_value("#seed") == "7"
    assert page.input_value("#num_inference_steps") == "5"
    assert facts(page)["seed"] == "7"
    # A picture that the service no longer has leaves its thumbnail and a sentence.
    page.evaluate(
        """() => {
          const entries = JSON.parse(localStorage['lumina.history']);
          entries[0].id = '0'.repeat(26);
          entries[0].images[0].url = `/jobs/${entries[0].id}/images/0`;
          localStorage['lumina.history'] = JSON.stringify(entries);
        }"""
    )
    page.reload()
    one.wait_offer()
    page.click("#history-list .entry >> nth=0")
    page.wait_for_selector("#frame .gone")
    assert "expired" in page.text_content("#frame .gone")
    assert page.get_attribute("#frame .gone img", "src").startswith("data:image/")
    assert page.input_value("#prompt") == "a green cross"
    # One, then all.
    page.hover("#history-list li >> nth=0")
    page.click("#history-list li >> nth=0 >> .remove")
    assert entries(page) == [f"{PROMPT}, seed 7"]
    page.click("#history-clear")
    page.click("#clear-here")
    assert entries(page) == []
    page.reload()
    one.wait_offer()
    assert entries(page) == []


def test_a_picture_on_its_way_is_followed_after_a_reload(visit):
    one = visit()
    set_prompt(one.page, PROMPT, num_images=2, num_inference_steps=50, width=128, height=128)
    one.page.click("#generate")
    wait_text(one.page, "#status", r"^Step")
    one.page.reload()
    wait_done(one.page)
    assert entries(one.page)[0].startswith(f"{PROMPT}, seed ")
    assert len(entries(one.page)) == 1


def test_a_seed_is_drawn_kept_and_let_go(page):
    assert draw(page, PROMPT, seed=0, num_inference_steps=4)["seed"] == "0"
    page.click("#lock")
    sheet = draw(page, PROMPT)
    assert page.input_value("#seed") == ""
    page.click("#lock")
    assert page.input_value("#seed") == sheet["seed"]
    assert page.get_attribute("#lock", "aria-pressed") == "true"
    assert draw(page, PROMPT)["seed"] == sheet["seed"]
    page.click("#dice")
    diced = page.input_value("#seed")
    assert re.fullmatch(r"\d{1,16}", diced)
    assert diced != sheet["seed"]
    page.click("#lock")
    assert page.input_value("#seed") == ""


def test_text_stays_text_and_the_programs_repeat_the_picture(page, tmp_path):
    draw(page, AWKWARD, seed=11, num_inference_steps=4)
    assert page.get_attribute("#frame .pictures img", "alt") == AWKWARD
    assert page.locator("img[src='x'], b:has-text('bold')").count() == 0
    source = page.get_attribute("#frame .pictures img", "src")
    origin = page.evaluate("location.origin")
    with urlopen(origin + source) as answer:
        wanted = hashlib.sha256(answer.read()).hexdigest()
    page.get_by_role("button", name="Use in code").click()
    for language, command in (("curl", ["bash", "-c"]), ("Python", [sys.executable, "-c"])):
        page.locator("#code-language label", has_text=language).click()
        program = page.text_content("#code-text")
        done = subprocess.run(
            [*command, program], cwd=tmp_path, capture_output=True, text=True, timeout=90
        )
        assert done.returncode == 0, done.stderr
        picture = tmp_path / "lumina-11.png"
        assert hashlib.sha256(picture.read_bytes()).hexdigest() == wanted, language
        picture.unlink()
    page.keyboard.press("Escape")
    assert page.locator("dialog[open]").count() == 0
