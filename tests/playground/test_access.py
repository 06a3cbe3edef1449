"""The page for everybody: keyboard alone, any width, light and dark, names for every control."""

import pytest
from playwright.sync_api import expect

from tests.playground.helpers import PATIENCE_MS, draw, entries, facts, wait_done

PROMPT = "a green cross"
PHONE = {"viewport": {"width": 360, "height": 740}}
CONTROLS = {
    "button", "checkbox", "combobox", "dialog", "image", "link", "progressbar", "radio",
    "radiogroup", "region", "slider", "spinbutton", "textbox", "DisclosureTriangle",
}  # fmt: skip

# Contrast of every visible text with what lies under it (WCAG 2, relative luminance).
CONTRAST = """() => {
  const rgb = (text) => {
    const canvas = new OffscreenCanvas(1, 1).getContext('2d');
    canvas.fillStyle = text;
    canvas.fillRect(0, 0, 1, 1);
    return [...canvas.getImageData(0, 0, 1, 1).data];
  };
  const luminance = (color) => {
    const [r, g, b] = color.map((value) => {
      const share = value / 255;
      return share <= 0.03928 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
    });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  const ground = (node) => {
    for (let at = node; at; at = at.parentElement) {
      const color = rgb(getComputedStyle(at).backgroundColor);
      if (color[3] === 255) return color.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  let seen = 0;
  while (walker.nextNode()) {
    const node = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || !node.checkVisibility()) continue;
    const [a, b] = [rgb(getComputedStyle(node).color).slice(0, 3), ground(node)].map(luminance);
    const contrast = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    seen += 1;
    if (contrast < 4.5) poor.push([walker.currentNode.textContent.trim(), contrast]);
  }
  return { poor, seen };
}"""


def tab_to(page, element_id, limit=60):
    for _ in range(limit):
        if page.evaluate("document.activeElement.id") == element_id:
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"{element_id} is not reached by Tab")


def test_the_keyboard_is_enough(page):
    tab_to(page, "prompt")
    page.keyboard.type(PROMPT)
    tab_to(page, "num_inference_steps")
    page.keyboard.type("4")
    tab_to(page, "seed")
    page.keyboard.type("3")
    outline = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
    assert outline == "solid"
    page.keyboard.press("Control+Enter")
    wait_done(page)
    assert facts(page)["seed"] == "3"
    tab_to(page, "seed")
    page.keyboard.press("Control+a")
    page.keyboard.type("4")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#history-list .entry")).to_have_count(2, timeout=PATIENCE_MS)
    wait_done(page)
    for _ in range(60):
        if page.evaluate("document.activeElement.className") == "entry":
            break
        page.keyboard.press("Tab")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Enter")
    expect(page.locator("#seed")).to_have_value("3", timeout=PATIENCE_MS)
    assert facts(page)["seed"] == "3"
    page.keyboard.press("Delete")
    assert entries(page) == [f"{PROMPT}, seed 4"]
    assert page.evaluate("document.activeElement.className") == "entry"


def test_a_phone_needs_no_sideways_scrolling(visit):
    page = visit(**PHONE, has_touch=True, is_mobile=True).page

    def assert_fits():
        assert page.evaluate("document.documentElement.scrollWidth") <= 360
        beyond = page.evaluate(
            "[...document.querySelectorAll('body *')].filter(node => node.checkVisibility() &&"
            " !node.closest('.visually-hidden, pre') && node.getBoundingClientRect().right > 361)"
            ".map(node => node.outerHTML.slice(0, 80))"
        )
        assert beyond == []

    page.click("#more summary")
    assert_fits()
    page.click("#service summary")
    assert_fits()
    draw(page, PROMPT, seed=3, num_inference_steps=4, num_images=2)
    assert_fits()
    page.get_by_role("button", name="Use in code").click()
    assert_fits()
    page.keyboard.press("Escape")
    page.locator("#mode label", has_text="Compare").click()
    page.click("#generate")
    page.wait_for_selector("#report table")
    assert_fits()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_can_be_read(visit, scheme):
    page = visit(color_scheme=scheme, expected=("422",)).page
    page.click("#more summary")
    draw(page, PROMPT, seed=3, num_inference_steps=4)
    page.fill("#quality", "101")
    page.click("#generate")
    page.wait_for_selector("#quality-problem")
    page.evaluate("document.querySelectorAll('.note').forEach(note => { note.hidden = false; })")
    page.evaluate("document.querySelector('#alert').textContent = 'Trouble'")
    page.evaluate("document.querySelector('#warnings').append('Warned')")
    found = page.evaluate(CONTRAST)
    assert found["seen"] > 40
    assert found["poor"] == []
    ground = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (int(ground.removeprefix("rgb(").split(",")[0]) < 60) == (scheme == "dark")


def test_the_theme_is_chosen_and_kept(visit):
    one = visit(color_scheme="light")
    page = one.page
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")  # light
    page.click("#theme")  # dark
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page.reload()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    assert page.get_attribute("#theme", "aria-label") == "Theme: dark. Change to system"


def test_every_control_has_a_name(page):
    page.click("#more summary")
    page.select_option("#template", "panel")
    page.locator("#cache label", has_text="number").click()
    draw(page, PROMPT, seed=3, num_inference_steps=4)
    page.locator("#mode label", has_text="Compare").click()
    page.click("#service summary")
    session = page.context.new_cdp_session(page)
    nameless = []
    controls = 0
    for node in session.send("Accessibility.getFullAXTree")["nodes"]:
        if node.get("ignored") or node["role"]["value"] not in CONTROLS:
            continue
        controls += 1
        if not node.get("name", {}).get("value", "").strip():
            nameless.append(node)
    assert controls > 45
    assert nameless == []
    # No id twice: labels and descriptions would point at the wrong element.
    ids = page.eval_on_selector_all("[id]", "nodes => nodes.map(node => node.id)")
    assert len(set(ids)) == len(ids)


def test_motion_can_be_refused(visit):
    page = visit(reduced_motion="reduce").page
    page.evaluate(
        "document.querySelector('#frame').replaceChildren("
        "Object.assign(document.createElement('div'), { className: 'waiting' }))"
    )
    assert (
        page.eval_on_selector("#frame .waiting", "n => getComputedStyle(n).animationName") == "none"
    )


def test_a_key_is_asked_for_kept_and_sent(visit):
    """A service that wants a key, as far as the page sees it: its answers to each request."""
    one = visit(expected=("401",))
    page = one.page
    problem = '{"code": "unauthorized", "detail": "the API key is unknown or was revoked"}'

    def guard(route):
        if route.request.headers.get("authorization") == "Bearer right":
            route.continue_()
        else:
            route.fulfill(status=401, content_type="application/problem+json", body=problem)

    for path in ("/presets", "/state", "/generate", "/jobs/**"):
        page.route(f"{one.origin}{path}", guard)
    page.reload()
    page.wait_for_selector("#key[open]")
    page.fill("#key-text", "wrong")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key-error >> text=unknown or was revoked")
    page.fill("#key-text", "right")
    page.keyboard.press("Enter")
    page.wait_for_selector("#key", state="hidden")
    one.wait_offer()
    page.unroute(f"{one.origin}/jobs/**")  # pictures have signed addresses there
    draw(page, PROMPT, seed=3, num_inference_steps=4)
    page.get_by_role("button", name="Use in code").click()
    program = page.text_content("#code-text")
    assert "$LUMINA_API_KEY" in program
    assert "right" not in program
