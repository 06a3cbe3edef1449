"""The examples of the OpenAPI document. A test holds them against their models."""

from typing import Any

JOB_ID = "01k9f6m2yq8v3xw7c5n0r4t1sz"

BODIES: dict[str, dict[str, Any]] = {
    "a prompt is enough": {"prompt": "three yellow stars"},
    "everything that shapes the picture": {
        "prompt": "a red circle above a blue square",
        "negative_prompt": "green",
        "width": 128,
        "height": 96,
        "num_inference_steps": 20,
        "guidance_scale": 4.0,
        "seed": 7,
        "sampler": "euler",
        "cache": "balanced",
        "output_format": "webp",
        "metadata": {"order": 5},
        "webhook_url": "https://example.org/hook",
    },
}

IMAGES_BODIES: dict[str, dict[str, Any]] = {
    "one picture": {"prompt": "three yellow stars", "size": "128x128"},
    "a stream with two unfinished pictures": {
        "prompt": "three yellow stars",
        "stream": True,
        "partial_images": 2,
    },
}

QUEUED: dict[str, Any] = {
    "id": JOB_ID,
    "status": "queued",
    "error": None,
    "position": 1,
    "estimated_start": "2026-11-07T09:30:00.400Z",
    "step": 0,
    "total": 0,
    "attempt": 0,
    "submitted_at": "2026-11-07T09:30:00.000Z",
    "started_at": None,
    "finished_at": None,
    "expires_at": None,
    "model": None,
    "seed": 7,
    "images": [],
    "timings": None,
    "steps": None,
    "prompt_tokens": None,
    "cache_decisions": None,
    "warnings": [],
    "metadata": None,
}

SUCCEEDED: dict[str, Any] = QUEUED | {
    "status": "succeeded",
    "position": None,
    "estimated_start": None,
    "step": 30,
    "total": 30,
    "attempt": 1,
    "started_at": "2026-11-07T09:30:00.010Z",
    "finished_at": "2026-11-07T09:30:00.410Z",
    "expires_at": "2026-11-08T09:30:00.410Z",
    "model": "demo",
    "images": [
        {
            "url": f"/jobs/{JOB_ID}/images/0",
            "sha256": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
            "width": 128,
            "height": 128,
            "seed": 7,
        }
    ],
    "timings": {
        "queue_s": 0.01,
        "encode_s": 0.01,
        "denoise_s": 0.33,
        "decode_s": 0.04,
        "store_s": 0.01,
        "total_s": 0.4,
    },
    "steps": {"computed": 30, "skipped": 0, "cfg": 30, "nfe": 60},
    "prompt_tokens": 24,
}

CANCELED: dict[str, Any] = QUEUED | {
    "status": "canceled",
    "position": None,
    "estimated_start": None,
    "finished_at": "2026-11-07T09:30:00.100Z",
    "expires_at": "2026-11-08T09:30:00.100Z",
}

OFFER: dict[str, Any] = {
    "model": "demo",
    "hash": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "limits": {
        "min_size": 64,
        "max_size": 128,
        "size_multiple": 16,
        "max_steps": 50,
        "max_images": 8,
        "max_prompt_tokens": 64,
    },
    "defaults": {"width": 128, "height": 128, "num_inference_steps": 30, "guidance_scale": 4.0},
    "presets": {"fast": {"num_inference_steps": 12}},
    "templates": ["real"],
    "loras": ["ink"],
}

IMAGES: dict[str, Any] = {
    "created": 1794043800,
    "background": "opaque",
    "output_format": "png",
    "size": "128x128",
    "data": [{"b64_json": "iVBORw0KGgo=", "seed": 7}],
    "usage": {
        "input_tokens": 24,
        "input_tokens_details": {"text_tokens": 24, "image_tokens": 0},
        "output_tokens": 64,
        "total_tokens": 88,
    },
}

MODEL: dict[str, Any] = {
    "id": "demo",
    "object": "model",
    "created": 0,
    "owned_by": "lumina-serve",
}

USAGE: dict[str, Any] = {
    "tenant": "acme",
    "key": "3f9a1c20b7de",
    "scopes": ["generate"],
    "weight": 1,
    "jobs_today": {
        "used": 12,
        "limit": 500,
        "remaining": 488,
        "device_s": 4.1,
        "resets_in_s": 52200,
        "resets_at": "2026-11-08T00:00:00.000Z",
    },
    "open_jobs": {"used": 1, "limit": 512, "remaining": 511},
    "requests": {"used": 3, "limit": 60, "remaining": 57, "window_s": 60, "resets_in_s": 41},
}

DEAD: dict[str, Any] = {
    "id": JOB_ID,
    "tenant": "acme",
    "pool": "default",
    "priority": "normal",
    "attempts": 3,
    "submitted_at": "2026-11-07T09:30:00.000Z",
    "finished_at": "2026-11-07T09:31:00.000Z",
    "error": {"code": "worker-lost", "detail": "the worker running this job died"},
}

DEAD_DETAIL: dict[str, Any] = DEAD | {"spec": {"prompt": "three yellow stars", "seed": 7}}

RETRIED: dict[str, Any] = {"retried": {JOB_ID: "01k9f6m2yq8v3xw7c5n0r4t1t0"}, "remaining": 0}

PURGED: dict[str, Any] = {"purged": 1, "remaining": 0}

WORKER: dict[str, Any] = {
    "id": "worker-1",
    "pool": "default",
    "running": 3,
    "beat_at": "2026-11-07T09:30:00.000Z",
}

POOL: dict[str, Any] = {
    "name": "default",
    "model": "demo",
    "model_hash": "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855",
    "queued": 12,
    "workers": [WORKER],
}

EVENT: dict[str, Any] = {
    "id": "1794043800010-0",
    "event": "progress",
    "data": f'{{"id":"{JOB_ID}","status":"running","step":3,"total":30}}',
}

IMAGE_EVENT: dict[str, Any] = {
    "event": "image_generation.partial_image",
    "data": '{"type":"image_generation.partial_image","partial_image_index":0,"b64_json":"iVBO"}',
}
