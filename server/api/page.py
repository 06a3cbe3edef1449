"""The pages: the playground at `/` and the reference of the API at `/docs`.

They need nothing from elsewhere. The policy lets a page run our own files only: no inline script or
style, no other host, no frame around it, and no text that becomes markup (`trusted-types 'none'`).
"""

import os
from pathlib import Path

from fastapi import APIRouter, FastAPI
from starlette.requests import Request
from starlette.responses import Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

UI_FOLDER = Path(__file__).parent / "ui"
REFERENCE_FOLDER = Path(__file__).parent / "reference"
POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data:",  # data: previews come inside their events
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
# Files are asked for again each time and answered 304, so that none outlives an upgrade.
HEADERS = {
    "Content-Security-Policy": POLICY,
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-cache",
}
# Some systems' own tables call modules plain text, which no browser runs.
MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}


class PageFiles(StaticFiles):
    """The files of the page with their headers, and 304 for what a browser has already."""

    def file_response(
        self,
        full_path: str | os.PathLike[str],
        stat_result: os.stat_result,
        scope: Scope,
        status_code: int = 200,
    ) -> Response:
        """Answer one file."""
        response = super().file_response(full_path, stat_result, scope, status_code)
        response.headers.update(HEADERS)
        if response.status_code == status_code:
            response.headers["Content-Type"] = MEDIA_TYPES[Path(full_path).suffix]
        return response


def add_pages(app: FastAPI) -> None:
    """Serve the playground at `/`, with its files below `/ui`, and the reference at `/docs`."""
    _add_page(app, "/", "/ui", UI_FOLDER)
    _add_page(app, "/docs", "/docs", REFERENCE_FOLDER)


def _add_page(app: FastAPI, path: str, mount: str, folder: Path) -> None:
    files = PageFiles(directory=folder)
    router = APIRouter()

    async def page(request: Request) -> Response:
        return await files.get_response("index.html", request.scope)

    router.add_api_route(path, page, methods=["GET", "HEAD"], include_in_schema=False)
    app.include_router(router)
    app.mount(mount, files)
