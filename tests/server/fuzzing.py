"""Requests that nobody would send, and the rule for every answer: no 5xx, nothing undocumented."""

import json
import random
import urllib.parse
from collections.abc import Callable
from typing import Any

import httpx
import schemathesis
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from schemathesis.checks import CHECKS, load_all_checks
from schemathesis.generation import GenerationMode

# What the answers of a service must have in common; the rest depends on its state.
CHECK_NAMES = (
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "allow_header_conformance",
)
# A 5xx that a caller asks for: by a deadline nobody could meet.
ASKED_FOR = {"deadline-too-short", "job-expired"}

QUIET = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]


def _fuzz(number: int, chosen_seed: int, strategy: Any, test: Callable[[Any], None]) -> None:
    """Call `test` with examples of a strategy: always the same for a seed."""

    @seed(chosen_seed)
    @settings(
        max_examples=number, deadline=None, database=None, suppress_health_check=QUIET,
        phases=(Phase.generate,),
    )  # fmt: skip
    @given(strategy)
    def run(case: Any) -> None:
        test(case)

    run()


def check_answer(answer: httpx.Response) -> None:
    """The rule for every answer, whatever was asked."""
    status = answer.status_code
    body = answer.content
    assert b"Traceback" not in body
    if status < 400:
        return
    error = answer.json()
    path = urllib.parse.urlsplit(str(answer.request.url)).path
    if path.startswith("/v1/"):
        assert answer.headers["content-type"] == "application/json"
        assert status != 422
        code = error["error"]["code"].replace("_", "-")
    else:
        assert answer.headers["content-type"] == "application/problem+json"
        assert error["status"] == status
        assert error["detail"]
        assert "\n" not in error["detail"]
        code = error["code"]
    assert code != "internal", error
    assert status < 500 or code in ASKED_FOR, (status, error)


def fuzz_documented(base_url: str, number: int, chosen_seed: int, job_ids: list[str]) -> int:
    """Fuzz every operation of the OpenAPI document, with valid and invalid data; returns how many
    operations there were. Raises what a check says."""
    load_all_checks()
    checks = [check for check in CHECKS.get_all() if check.__name__ in CHECK_NAMES]
    assert len(checks) == len(CHECK_NAMES)
    schema = schemathesis.openapi.from_url(f"{base_url}/openapi.json")
    count = 0
    for result in schema.get_all_operations():
        operation = result.ok()
        count += 1
        for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
            if mode == GenerationMode.NEGATIVE and not _can_be_wrong(operation):
                continue
            chance = random.Random(chosen_seed)

            def call(case: Any, chance: random.Random = chance) -> None:
                if "job_id" in (case.path_parameters or {}) and chance.random() < 0.7:
                    case.path_parameters["job_id"] = chance.choice(job_ids)
                if isinstance(case.body, dict) and isinstance(case.body.get("prompt"), str):
                    case.body["prompt"] = case.body["prompt"].replace("hang", "")
                answer = case.call(timeout=30)
                case.validate_response(answer, checks=checks)
                _check_requests(answer)

            _fuzz(number, chosen_seed, operation.as_strategy(generation_mode=mode), call)
    return count


def _can_be_wrong(operation: Any) -> bool:
    """Whether an operation takes more than texts, of which none is wrong."""
    return bool(operation.body) or len(list(operation.query)) > 0


def _check_requests(answer: Any) -> None:
    """`check_answer` for an answer of the other client."""
    request = httpx.Request(answer.request.method, answer.request.url)
    headers = [(name, value) for name, values in answer.headers.items() for value in values]
    headers = [(n, v) for n, v in headers if n.lower() not in ("content-encoding",)]
    check_answer(
        httpx.Response(answer.status_code, headers=headers, content=answer.content, request=request)
    )


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4)
    ),
    max_leaves=12,
)
FIELDS = (
    "prompt", "width", "seed", "loras", "sigmas", "metadata", "panel", "n", "size", "stream",
    "partial_images", "cache", "num_images",
)  # fmt: skip
BODIES = (
    st.binary(max_size=200)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=5)
    .map(lambda fields: {"prompt": "x", **fields})
    .map(lambda value: json.dumps(value).encode())
)
SEGMENTS = st.sampled_from(
    ["jobs", "v1", "images", "events", "cancel", "ui", "..", "%2e%2e", "%2f", "%00", "~", "docs",
     "generate", "generations", "models", "admin", "0", "-1", "01k9f6m2yq8v3xw7c5n0r4t1sz"]
) | st.text(max_size=12).map(urllib.parse.quote)  # fmt: skip
PATHS = st.lists(SEGMENTS, max_size=6).map(lambda parts: "/" + "/".join(parts))
HEADER_TEXT = st.text(st.characters(min_codepoint=32, max_codepoint=255, exclude_characters="\x7f"))
HEADERS = st.dictionaries(
    st.sampled_from(
        ["accept", "prefer", "idempotency-key", "last-event-id", "if-none-match", "authorization",
         "x-request-id", "cookie", "range", "origin", "referer", "content-encoding", "expect"]
    ),
    HEADER_TEXT,
    max_size=4,
)  # fmt: skip
QUERIES = st.dictionaries(
    st.sampled_from(["limit", "status", "cursor", "expires", "signature", "x"]),
    st.text(max_size=8),
    max_size=3,
)
TYPES = st.sampled_from(["application/json"] * 3 + ["text/plain", "multipart/form-data", ""])


@st.composite
def requests(draw: Any) -> dict[str, Any]:
    """Any request: often one of the documented places, with any headers and any body."""
    places = ["/generate", "/v1/images/generations", "/jobs", "/presets"]
    path = draw(st.sampled_from(places) | PATHS)
    method = draw(st.sampled_from(["GET", "POST", "POST", "DELETE", "PUT", "HEAD", "OPTIONS"]))
    headers = {k: v.strip().encode("latin-1") for k, v in draw(HEADERS).items()}
    headers.pop("expect", None)
    content_type = draw(TYPES)
    if content_type:
        headers["content-type"] = content_type.encode()
    return {
        "method": method, "url": path, "headers": headers, "params": draw(QUERIES),
        "content": draw(BODIES) if method in ("POST", "PUT", "DELETE") else None,
    }  # fmt: skip


def fuzz_anything(base_url: str, number: int, chosen_seed: int) -> None:
    """Send requests that follow no document."""
    with httpx.Client(base_url=base_url, timeout=30, trust_env=False) as client:

        def call(asked: dict[str, Any]) -> None:
            asked = {k: v for k, v in asked.items() if v is not None}
            with client.stream(**asked) as answer:
                if answer.headers.get("content-type", "").startswith("text/event-stream"):
                    return
                answer.read()
            if answer.request.method != "HEAD" and answer.status_code >= 400:
                check_answer(answer)
            assert answer.status_code < 500 or answer.request.method != "HEAD"

        _fuzz(number, chosen_seed, requests(), call)
