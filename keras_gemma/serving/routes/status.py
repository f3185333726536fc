"""State of the server: probes, version and metrics."""

from typing import Any

import keras
from fastapi import APIRouter, Request
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.responses import Response

from keras_gemma.serving.errors import RETRY_SECONDS
from keras_gemma.serving.json_response import JsonResponse
from keras_gemma.serving.service import service_of
from keras_gemma.version import __version__

router = APIRouter(tags=["Server"])


@router.get("/health", summary="200 if the engine answers requests, otherwise 503")
async def health(request: Request) -> Response:
    service = service_of(request)
    status = service.status()
    stats = service.texts.engine.stats()
    body = {
        "status": "ok" if status == "ready" else status,
        "slots_used": stats.slots_used,
        "slots_total": stats.slots_total,
        "waiting": stats.num_waiting,
    }
    if status == "ready":
        return JsonResponse(body)
    return JsonResponse(body, 503, {"Retry-After": str(RETRY_SECONDS)})


@router.get("/ready", summary="Same as /health, for readiness probes")
async def ready(request: Request) -> Response:
    return await health(request)


@router.get("/live", summary="200 if the process answers, unless the engine has failed")
async def live(request: Request) -> Response:
    status = service_of(request).status()
    return JsonResponse({"status": status}, 503 if status == "dead" else 200)


@router.get("/version", summary="Version of the package")
async def version() -> dict[str, Any]:
    return {"version": __version__, "backend": keras.config.backend(), "keras": keras.__version__}


@router.get("/metrics", summary="Prometheus metrics")
async def metrics(request: Request) -> Response:
    return Response(service_of(request).metrics.text(), media_type=CONTENT_TYPE_LATEST)
