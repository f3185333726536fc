"""Tokenization, in the dialects of TGI, vLLM and llama.cpp."""

from typing import Any

from fastapi import APIRouter, Request

from keras_gemma.serving.chat_generation import ChatRequest, prepare
from keras_gemma.serving.errors import invalid
from keras_gemma.serving.json_body import JsonRoute
from keras_gemma.serving.schemas.tokens import DetokenizeBody, TokenizeBody
from keras_gemma.serving.service import Service, in_thread, service_of
from keras_gemma.serving.token_names import TokenNames
from keras_gemma.text.chat_template import CHAT_TEMPLATE

router = APIRouter(tags=["Tokens"], route_class=JsonRoute)


@router.post("/tokenize", summary="Convert text to token ids")
async def tokenize(body: TokenizeBody, request: Request) -> Any:
    service = service_of(request)
    service.check_model(body.model)
    try:
        return await in_thread(tokenize_as_asked, service, body)
    except Exception as error:
        raise invalid(error) from error


@router.post("/detokenize", summary="Convert token ids to text")
async def detokenize(body: DetokenizeBody, request: Request) -> dict[str, str]:
    texts = service_of(request).texts
    service_of(request).check_model(body.model)
    try:
        ids = texts.check_ids("tokens", body.tokens).tolist() if body.tokens else []
    except Exception as error:
        raise invalid(error, "tokens") from error
    text = await in_thread(texts.decode, ids)
    return {"prompt": text, "content": text}


@router.get("/tokenizer_info", summary="Special tokens and the chat template")
async def tokenizer_info(request: Request) -> dict[str, Any]:
    tokenizer = service_of(request).texts.tokenizer
    return {
        "bos_token": tokenizer.start_token,
        "eos_token": tokenizer.end_token,
        "pad_token": tokenizer.pad_token,
        "unk_token": "<unk>",
        "chat_template": CHAT_TEMPLATE,
        "vocab_size": tokenizer.vocabulary_size(),
        "model_max_length": service_of(request).texts.max_length,
    }


def tokenize_as_asked(service: Service, body: TokenizeBody) -> Any:
    """Returns the tokens of a text in the format of the body's dialect."""
    texts = service.texts
    names = TokenNames(texts.tokenizer.pieces)
    if body.content is not None:
        (ids,) = texts.tokenizer.encode([body.content], body.parse_special)
        if body.add_special:
            ids = [texts.tokenizer.start_token_id, *ids]
        if body.with_pieces:
            return {"tokens": [{"id": id, "piece": names.string_of(id)} for id in ids]}
        return {"tokens": ids}
    if body.messages is not None:
        messages = [message.to_chat_message() for message in body.messages]
        tools = [tool.model_dump(exclude_none=True) for tool in body.tools or ()]
        ids = prepare(texts, ChatRequest(messages, None, [], {}, tools=tools)).ids.tolist()
    elif body.prompt is not None:
        if body.add_special_tokens is False:
            (ids,) = texts.tokenizer.encode([body.prompt])
        else:
            ids = texts.encode([body.prompt])[0].tolist()
    else:
        return with_places(names, texts.encode([body.inputs or ""])[0].tolist())
    answer = {"count": len(ids), "max_model_len": texts.max_length, "tokens": ids}
    if body.return_token_strs:
        answer["token_strs"] = [names.string_of(id) for id in ids]
    return answer


def with_places(names: TokenNames, ids: list[int]) -> list[dict[str, Any]]:
    """Returns tokens with their places in the text, in characters, as TGI does."""
    entries, offset = [], 0
    for id in ids:
        end = offset + names.length_of(id)
        entries.append({"id": id, "text": names.string_of(id), "start": offset, "stop": end})
        offset = end
    return entries
