"""Two settings of one picture: same seed, one after the other, with what they cost and differ."""

import re

from tests.playground.helpers import entries, set_prompt, wait_done, wait_text


def bodies(page):
    return page.evaluate("JSON.parse(localStorage['lumina.history']).map(entry => entry.body)")


def compare(page, **settings):
    page.locator("#mode label", has_text="Compare").click()
    set_prompt(page, "three yellow stars", **settings)
    page.click("#generate")
    wait_done(page)
    page.wait_for_selector("#report table")


def row(page, name):
    """The cells of a row of the table: A, B, and their ratio."""
    line = page.locator(
        "#report tbody tr", has=page.get_by_role("rowheader", name=name, exact=True)
    )
    return line.locator("td").all_inner_texts()


def test_cache_off_against_balanced(page):
    compare(page, num_inference_steps=30)
    balanced, off = bodies(page)
    assert (off["cache"], balanced["cache"]) == ("off", "balanced")
    assert off["seed"] == balanced["seed"]
    assert {**off, "cache": ""} == {**balanced, "cache": ""}
    assert page.locator("#frame .compared img").count() == 2
    assert row(page, "steps")[0] == "30 computed"
    assert re.fullmatch(r"\d+ computed, \d+ skipped", row(page, "steps")[1])
    assert re.fullmatch(r"\d+\.\d\d×", row(page, "denoise")[2])
    likeness = page.text_content("#report thead th >> nth=0")
    psnr = float(re.match(r"PSNR ([\d.]+) dB", likeness)[1])
    assert 8 < psnr < 80
    assert len(entries(page)) == 2

    page.get_by_text("Slider").click()
    slider = page.get_by_role("slider")
    slider.focus()
    before = page.eval_on_selector(".overlay .over", "node => getComputedStyle(node).clipPath")
    page.keyboard.press("ArrowRight")
    after = page.eval_on_selector(".overlay .over", "node => getComputedStyle(node).clipPath")
    assert before != after
    page.locator("#report label", has_text="Difference").click()
    assert page.eval_on_selector(".heat canvas", "canvas => [canvas.width, canvas.height]") == [
        64,
        64,
    ]


def test_equal_settings_give_equal_pictures(page):
    page.locator("#mode label", has_text="Compare").click()
    page.select_option("#a-value", "balanced")
    compare(page, num_inference_steps=6)
    assert page.text_content("#report thead th >> nth=0") == "Equal in every pixel"


def test_another_setting_can_differ(page):
    page.locator("#mode label", has_text="Compare").click()
    page.select_option("#vary", "num_inference_steps")
    page.fill("#a-value", "8")
    page.fill("#b-value", "4")
    compare(page, seed=5)
    assert [(body["num_inference_steps"], body["seed"]) for body in bodies(page)] == [
        (4, 5),
        (8, 5),
    ]
    assert row(page, "steps")[:2] == ["8 computed", "4 computed"]


def test_a_comparison_can_be_canceled(page):
    page.locator("#mode label", has_text="Compare").click()
    set_prompt(page, "three yellow stars", num_inference_steps=50, width=128, height=128)
    page.click("#generate")
    wait_text(page, "#status", r"^A: Step")
    page.keyboard.press("Escape")
    page.wait_for_selector("#cancel", state="hidden")
    assert page.text_content("#alert") == "Canceled."
    assert len(entries(page)) == 1
