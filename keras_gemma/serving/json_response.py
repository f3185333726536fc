"""JSON responses."""

import json
from typing import Any

from starlette.responses import Response


class JsonResponse(Response):
    """Response of ASCII JSON.

    Starlette's own fails on half of a surrogate pair, which a request may contain and a response
    repeats, such as metadata.
    """

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return json.dumps(content, separators=(",", ":"), allow_nan=False).encode("ascii")
