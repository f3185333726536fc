"""The chat page."""

from pathlib import Path

from fastapi import APIRouter, Request
from starlette.responses import FileResponse, Response

from keras_gemma.serving.errors import ApiError
from keras_gemma.serving.service import service_of

router = APIRouter(include_in_schema=False)

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-cache",
}
"""Headers of the page: nothing is loaded from elsewhere, and no script is part of the HTML."""

TYPES = {
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".svg": "image/svg+xml",
    ".png": "image/png",
    ".ico": "image/x-icon",
}
"""Files that are served, by suffix."""


@router.get("/")
async def index(request: Request) -> Response:
    return page_file(service_of(request).settings.page_folder, "index.html")


@router.get("/page/{name}")
async def file(name: str, request: Request) -> Response:
    return page_file(service_of(request).settings.page_folder, name)


def page_file(folder: Path, name: str) -> Response:
    """Returns a file of the page. The name has no folder, because the route has no slash."""
    path = folder / name
    kind = TYPES.get(path.suffix)
    if kind is None or path.parent != folder or not path.is_file():
        raise ApiError(404, f"The page has no file {name!a:.100}.", "not_found")
    return FileResponse(path, media_type=kind, headers=HEADERS)
