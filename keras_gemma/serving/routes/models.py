"""OpenAI's `/v1/models`."""

from typing import Any

from fastapi import APIRouter, Request

from keras_gemma.serving.service import Service, service_of

router = APIRouter(tags=["OpenAI"])


@router.get("/v1/models", summary="List the served names of the model")
async def list_models(request: Request) -> dict[str, Any]:
    service = service_of(request)
    cards = [card(service, name) for name in service.settings.served_names]
    return {"object": "list", "data": cards}


@router.get("/v1/models/{model:path}", summary="Describe the model")
async def get_model(model: str, request: Request) -> dict[str, Any]:
    service = service_of(request)
    return card(service, service.check_model(model))


def card(service: Service, name: str) -> dict[str, Any]:
    """Returns the description of a served name. Anthropic's clients read the last two fields."""
    return {
        "id": name,
        "object": "model",
        "created": service.created,
        "owned_by": "keras-gemma",
        "root": service.model,
        "parent": None,
        "max_model_len": service.texts.max_length,
        "type": "model",
        "display_name": name,
    }
