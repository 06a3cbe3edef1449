"""The playground without a browser: what is served, how, and that its files fit together."""

import asyncio
import re
from pathlib import Path

import pytest

from server.api.page import UI_FOLDER
from tests.server.fake_worker import service

FILES = sorted(UI_FOLDER.iterdir())
MODULES = [file for file in FILES if file.suffix == ".js" and file.name != "theme-start.js"]
PAGE = (UI_FOLDER / "index.html").read_text(encoding="utf-8")
IMPORT = re.compile(r'^import (?:\{([^}]*)\} from )?"\./([\w-]+\.js)";$', re.M)
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


def names(suffix: str) -> set[str]:
    return {file.name for file in FILES if file.suffix == suffix}


def test_every_file_is_served_with_its_headers_and_a_tag(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            for path, file in [
                ("/", UI_FOLDER / "index.html"),
                *((f"/ui/{f.name}", f) for f in FILES),
            ]:
                answer = await it.client.get(path)
                assert answer.status_code == 200, path
                assert answer.content == file.read_bytes()
                assert answer.headers["content-type"] == MEDIA_TYPES[file.suffix]
                assert answer.headers["cache-control"] == "no-cache"
                assert answer.headers["x-content-type-options"] == "nosniff"
                tag = {"if-none-match": answer.headers["etag"]}
                again = await it.client.get(path, headers=tag)
                assert (again.status_code, again.content) == (304, b"")
                assert again.headers["cache-control"] == "no-cache"
                assert (await it.client.head(path)).headers["etag"] == answer.headers["etag"]
            for missing in ("/ui/none.js", "/ui/", "/ui/../app.py", "/ui/%2e%2e/app.py"):
                answer = await it.client.get(missing)
                assert (answer.status_code, answer.json()["code"]) == (404, "not-found"), missing

    asyncio.run(scenario())


def test_the_policy_allows_our_own_files_only(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            headers = (await it.client.get("/")).headers
            parts = headers["content-security-policy"].split("; ")
            policy = {part.split()[0]: part.split()[1:] for part in parts}
            assert policy.pop("img-src") == ["'self'", "data:"]
            for name in ("script-src", "style-src", "connect-src"):
                assert policy.pop(name) == ["'self'"]
            assert policy.pop("require-trusted-types-for") == ["'script'"]
            assert set(policy) == {
                "default-src", "base-uri", "form-action", "frame-ancestors", "trusted-types",
            }  # fmt: skip
            assert all(values == ["'none'"] for values in policy.values())
            assert headers["referrer-policy"] == "no-referrer"

    asyncio.run(scenario())


def test_the_page_links_every_style_and_its_modules_reach_every_other() -> None:
    linked = set(re.findall(r'(?:src|href)="/ui/([^"]+)"', PAGE))
    assert linked == {"main.js", "theme-start.js", "icon.svg"} | names(".css")
    reached, todo = set(), ["main.js"]
    while todo:
        name = todo.pop()
        if name not in reached:
            reached.add(name)
            text = (UI_FOLDER / name).read_text(encoding="utf-8")
            todo += [target for _, target in IMPORT.findall(text)]
    assert reached | {"theme-start.js"} == names(".js")


@pytest.mark.parametrize("module", MODULES, ids=lambda file: file.name)
def test_a_module_imports_what_is_there_and_uses_it(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert len(re.findall(r"^import ", text, re.M)) == len(IMPORT.findall(text))
    body = IMPORT.sub("", text)
    for imported, target in IMPORT.findall(text):
        source = (UI_FOLDER / target).read_text(encoding="utf-8")
        exported = re.findall(
            r"^export (?:async )?(?:function\*?|const|class) ([\w$]+)", source, re.M
        )
        for name in filter(None, (part.strip() for part in imported.split(","))):
            assert name in exported, f"{name} of {target}"
            assert re.search(rf"(?<![\w$]){re.escape(name)}(?![\w$])", body), f"{name} is not used"


def test_modules_ask_only_for_elements_that_the_page_has() -> None:
    ids = re.findall(r' id="([\w-]+)"', PAGE)
    assert len(set(ids)) == len(ids)
    asked = {
        name
        for module in MODULES
        for name in re.findall(r'\$\("([\w-]+)"\)', module.read_text(encoding="utf-8"))
    }
    assert len(asked) > 40
    assert asked <= set(ids)
    pointed = re.findall(r'(?:for|aria-labelledby|aria-describedby)="([\w-]+)"', PAGE)
    assert set(pointed) <= set(ids)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_nothing_comes_from_elsewhere_and_no_text_becomes_markup(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    assert not re.search(
        r"https?:|//cdn|\burl\((?!#)|@import", text.replace("http://www.w3.org/2000/svg", "")
    )
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text)
    if file.suffix == ".html":
        assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?![^>]*\ssrc=)|javascript:", text)


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_files_are_small(file: Path) -> None:
    assert len(file.read_text(encoding="utf-8").splitlines()) <= 400
