"""The OpenAPI document: complete, with examples that hold, and every error has its section."""

import asyncio
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
from fastapi import FastAPI
from pydantic import BaseModel

from server.api import admin, examples
from server.api.answers import JobAnswer
from server.api.app import create_app
from server.api.health import Offer
from server.api.jobs import JobList
from server.api.openai_errors import OpenAIError
from server.api.openai_schemas import ImagesAnswer, ImagesBody, ModelAnswer, native_body
from server.api.page import REFERENCE_FOLDER
from server.api.problems import STATUSES, TITLES, TYPE_PREFIX, Problem
from server.api.schemas import GenerateBody, parse_body, parse_generate
from server.api.usage import UsageAnswer
from server.config import Settings
from tests.server.fake_worker import service
from tests.server.live import service_process

ROOT = Path(__file__).parents[2]
ERRORS = ROOT / "docs" / "errors.md"


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return create_app(Settings(data_dir=tmp_path_factory.mktemp("data"))).openapi()


def operations(document: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    return [
        (f"{method} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]


def test_every_endpoint_is_described_with_an_example_of_every_answer(
    document: dict[str, Any],
) -> None:
    found = operations(document)
    assert len(found) >= 14
    for name, operation in found:
        assert operation["summary"], name
        assert operation["description"], name
        for status, answer in operation["responses"].items():
            assert answer["description"], (name, status)
            for media, content in answer.get("content", {}).items():
                if media == "application/json" or "problem" in media:
                    assert content["schema"], (name, status)
                    assert "example" in content or content["examples"], (name, status)
        assert {"403", "500"} <= operation["responses"].keys(), name
        if "requestBody" in operation:
            content = operation["requestBody"]["content"]["application/json"]
            assert content["examples"], name
            assert {"400", "408", "413", "415"} <= operation["responses"].keys(), name


def test_errors_are_documented_in_the_language_of_their_path(document: dict[str, Any]) -> None:
    for name, operation in operations(document):
        openai = " /v1/" in name
        for status, answer in operation["responses"].items():
            if int(status) < 400:
                continue
            assert not (openai and status == "422")
            media = "application/json" if openai else "application/problem+json"
            assert list(answer["content"]) == [media], name
            content = answer["content"][media]
            model: type[BaseModel] = OpenAIError if openai else Problem
            assert content["schema"] == {"$ref": f"#/components/schemas/{model.__name__}"}
            for code, example in content["examples"].items():
                model.model_validate(example["value"])
                if not openai:
                    assert example["value"]["status"] == int(status) == STATUSES[code]


def test_references_lead_somewhere(document: dict[str, Any]) -> None:
    def references(part: Any) -> list[str]:
        if isinstance(part, dict):
            mine = [part["$ref"]] if isinstance(part.get("$ref"), str) else []
            return mine + [ref for value in part.values() for ref in references(value)]
        if isinstance(part, list):
            return [ref for value in part for ref in references(value)]
        return []

    found = set(references(document))
    assert "#/components/schemas/GenerateBody" in found
    defined = {f"#/components/schemas/{name}" for name in document["components"]["schemas"]}
    assert found <= defined
    assert not {name for name in defined if "ValidationError" in name}
    assert not {name for name in defined if "__" in name}, "two models of one name"


def test_examples_hold() -> None:
    for body in examples.BODIES.values():
        parse_generate(body)
    for body in examples.IMAGES_BODIES.values():
        native_body(parse_body(ImagesBody, body))
    for job in (examples.QUEUED, examples.SUCCEEDED, examples.CANCELED):
        assert JobAnswer.model_validate(job, strict=True).model_dump() == job
        JobList.model_validate({"jobs": [job]})
    assert Offer.model_validate(examples.OFFER).model_dump() == examples.OFFER
    assert ImagesAnswer.model_validate(examples.IMAGES).model_dump(exclude_none=True) == (
        examples.IMAGES
    )
    for model, example in (
        (UsageAnswer, examples.USAGE), (admin.DeadJob, examples.DEAD),
        (admin.DeadJobDetail, examples.DEAD_DETAIL), (admin.Retried, examples.RETRIED),
        (admin.Purged, examples.PURGED), (admin.PoolDetail, examples.POOL),
        (admin.WorkerState, examples.WORKER),
    ):  # fmt: skip
        assert model.model_validate(example).model_dump() == example
    assert ModelAnswer.model_validate(examples.MODEL).model_dump() == examples.MODEL


def test_bodies_are_described_field_by_field(document: dict[str, Any]) -> None:
    for model in (GenerateBody, ImagesBody):
        schema = document["components"]["schemas"][model.__name__]
        assert schema["required"] == ["prompt"]
        assert schema["additionalProperties"] is False
        assert all(field.get("description") for field in schema["properties"].values())


def test_every_problem_has_its_section() -> None:
    sections = re.findall(r"^## (.+)$", ERRORS.read_text(), re.MULTILINE)
    assert sorted(sections) == sorted(TITLES)
    assert set(STATUSES) | {"http-error"} == set(TITLES)
    for section in re.split(r"^## ", ERRORS.read_text(), flags=re.MULTILINE)[1:]:
        code = section.split("\n", 1)[0]
        if code in STATUSES:
            text = " ".join(section.split())
            assert text.startswith(f"{code} {STATUSES[code]}. {TITLES[code]}. "), code
        assert "What to do: " in section, code
    assert TYPE_PREFIX.startswith("urn:")


def test_the_app_keeps_its_document(document: dict[str, Any], tmp_path: Path) -> None:
    app: FastAPI = create_app(Settings(data_dir=tmp_path))
    assert app.openapi() is app.openapi()
    assert app.openapi() == document


def test_the_reference_page_needs_nothing_from_elsewhere(redis_url: str, tmp_path: Path) -> None:
    async def scenario() -> None:
        async with service(redis_url, tmp_path, worker=False) as it:
            page = await it.client.get("/docs")
            assert page.headers["content-type"].startswith("text/html")
            assert "connect-src 'self'" in page.headers["content-security-policy"]
            linked = re.findall(r'(?:src|href)="(/[^"]*)"', page.text)
            assert {"/docs/reference.js", "/docs/reference.css", "/openapi.json"} <= set(linked)
            for path in linked:
                assert (await it.client.get(path)).status_code == 200, path
            assert (await it.client.get("/docs/nothing")).status_code == 404

    asyncio.run(scenario())
    for file in REFERENCE_FOLDER.iterdir():
        text = file.read_text()
        assert not re.search(r"https?:|//[a-z]+\.", text), file
        assert "innerHTML" not in text


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("chromium"), reason="there is no Chromium")
def test_the_reference_page_shows_every_endpoint(
    redis_url: str, tmp_path: Path, document: dict[str, Any]
) -> None:
    from playwright.sync_api import sync_playwright

    with service_process(redis_url, tmp_path) as base_url, sync_playwright() as browsers:
        options = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        browser = browsers.chromium.launch(executable_path=shutil.which("chromium"), args=options)
        page = browser.new_page()
        errors: list[str] = []
        foreign: list[str] = []
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda r: r.url.startswith(base_url) or foreign.append(r.url))
        page.goto(f"{base_url}/docs")
        page.wait_for_selector("section")
        shown = page.locator("section > h2").all_text_contents()
        prose = page.locator("p, td, summary").all_text_contents()
        browser.close()
    assert sorted(shown) == sorted(
        f"{name.split(' ')[0].upper()} {name.split(' ')[1]}" for name, _ in operations(document)
    )
    assert [text for text in prose if "`" in text] == []
    assert errors == foreign == []
