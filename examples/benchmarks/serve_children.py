"""Servers to compare with: `generate` one request at a time, and llama.cpp with slots.

    python examples/benchmarks/serve_children.py one-at-a-time MODEL --port 8001 --dtype bfloat16
    python examples/benchmarks/serve_children.py llama.cpp-slots MODEL.gguf --port 8001 --slots 8

Both know only what serve.py asks: /health, /v1/models, and /v1/completions with a text or ids, as a
stream, without stop tokens. The second one is llama.cpp's own server in short: one batch per turn
has the next token of each slot, then prompt tokens. (`llama_cpp.server` decodes one request at a
time.)
"""

import argparse
import asyncio
import codecs
import json
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import StreamingResponse

Events = Callable[[dict[str, Any]], AsyncIterator[dict[str, Any]]]
"""Function from the body of a request to its events."""


def make_app(name: str, events: Events) -> FastAPI:
    """Returns an application that streams `events`."""
    app = FastAPI()

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ready"}

    @app.get("/v1/models")
    def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, "object": "model"}]}

    @app.post("/v1/completions")
    async def completions(request: Request) -> StreamingResponse:
        body = await request.json()

        async def stream() -> AsyncIterator[str]:
            async for event in events(body):
                yield f"data: {json.dumps(event)}\n\n"
            yield "data: [DONE]\n\n"

        return StreamingResponse(stream(), media_type="text/event-stream")

    return app


def text_event(text: str, finish_reason: str | None = None) -> dict[str, Any]:
    return {"choices": [{"index": 0, "text": text, "finish_reason": finish_reason}]}


def usage_event(prompt_tokens: int, completion_tokens: int) -> dict[str, Any]:
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens}
    return {"choices": [], "usage": usage}


def one_at_a_time(options: argparse.Namespace) -> FastAPI:
    """Returns a server that calls `lm.generate` for one request after the other."""
    from keras_gemma import GemmaCausalLM

    lm = GemmaCausalLM.from_preset(
        options.model, dtype=options.dtype, quantization=options.quantization
    )
    tokenizer = lm.preprocessor.tokenizer
    lock = asyncio.Lock()

    def generate(body: dict[str, Any]) -> tuple[str, int, int]:
        prompt = body["prompt"]
        if isinstance(prompt, str):
            prompt = [tokenizer.start_token_id, *tokenizer.encode([prompt])[0]]
        ids = lm.generate(
            [prompt],
            max_new_tokens=body["max_tokens"],
            temperature=body["temperature"],
            seed=body["seed"],
            sampler="random",
            stop_token_ids=None,
        )[0][len(prompt) :]
        return tokenizer.detokenize(ids), len(prompt), len(ids)

    async def events(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        async with lock:
            text, prompt_tokens, new_tokens = await asyncio.to_thread(generate, body)
        yield text_event(text, "length")
        yield usage_event(prompt_tokens, new_tokens)

    return make_app("one-at-a-time", events)


class Slot:
    """A sequence of llama.cpp: prompt, sampler and the queue of its texts."""

    def __init__(self, ids: list[int], body: dict[str, Any], send: Callable[[Any], None]) -> None:
        self.ids, self.body, self.send = ids, body, send
        self.length = 0
        self.new_tokens = 0
        self.sampler: Any = None
        self.is_gone = False
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")


class Llama:
    """llama.cpp with continuous batching: `add` from any thread, `run` on one."""

    batch_tokens = 512

    def __init__(self, options: argparse.Namespace) -> None:
        import llama_cpp

        self.llama_cpp = llama_cpp
        self.model = llama_cpp.llama_model_load_from_file(
            options.model.encode(), llama_cpp.llama_model_default_params()
        )
        self.vocabulary = llama_cpp.llama_model_get_vocab(self.model)
        settings = llama_cpp.llama_context_default_params()
        settings.n_ctx = options.slots * options.context
        settings.n_batch = settings.n_ubatch = self.batch_tokens
        settings.n_seq_max, settings.kv_unified = options.slots, True
        settings.n_threads = settings.n_threads_batch = options.threads
        self.context = llama_cpp.llama_init_from_model(self.model, settings)
        self.memory = llama_cpp.llama_get_memory(self.context)
        self.batch = llama_cpp.llama_batch_init(self.batch_tokens, 0, 1)
        self.waiting: queue.Queue[Slot] = queue.Queue()
        self.slots: list[Slot | None] = [None] * options.slots

    def tokenize(self, text: str) -> list[int]:
        ids = (self.llama_cpp.llama_token * (len(text.encode()) + 8))()
        raw = text.encode()
        count = self.llama_cpp.llama_tokenize(
            self.vocabulary, raw, len(raw), ids, len(ids), True, False
        )
        return list(ids[:count])

    def piece(self, token: int) -> bytes:
        buffer = (self.llama_cpp.ctypes.c_char * 256)()
        size = self.llama_cpp.llama_token_to_piece(self.vocabulary, token, buffer, 256, 0, False)
        return bytes(buffer[:size])

    def run(self) -> None:
        while True:
            self._fill_slots()
            places = self._fill_batch()
            if self.llama_cpp.llama_decode(self.context, self.batch) != 0:
                raise RuntimeError("llama.cpp could not decode a batch")
            for number, place in places.items():
                self._next_token(number, place)

    def _fill_slots(self) -> None:
        """Puts waiting requests in free slots, and waits if there is nothing to do."""
        for number, slot in enumerate(self.slots):
            is_idle = not any(self.slots)
            if slot is None and (is_idle or not self.waiting.empty()):
                slot = self.waiting.get()
                llama_cpp, body = self.llama_cpp, slot.body
                slot.sampler = llama_cpp.llama_sampler_chain_init(
                    llama_cpp.llama_sampler_chain_default_params()
                )
                parts = [llama_cpp.llama_sampler_init_greedy()]
                if body["temperature"] > 0:
                    parts = [
                        llama_cpp.llama_sampler_init_temp(body["temperature"]),
                        llama_cpp.llama_sampler_init_dist(body["seed"]),
                    ]
                for part in parts:
                    llama_cpp.llama_sampler_chain_add(slot.sampler, part)
                self.slots[number] = slot

    def _fill_batch(self) -> dict[int, int]:
        """Returns the place of the last token by slot, for slots whose next token is known then."""
        self.batch.n_tokens = 0
        places = {}
        # Slots that decode have one token left, and come first.
        order = sorted((n for n, slot in enumerate(self.slots) if slot), key=self._tokens_left)
        for number in order:
            slot = self.slots[number]
            take = min(self._tokens_left(number), self.batch_tokens - self.batch.n_tokens)
            for token in slot.ids[slot.length : slot.length + take]:
                place = self.batch.n_tokens
                self.batch.token[place], self.batch.pos[place] = token, slot.length
                self.batch.n_seq_id[place], self.batch.seq_id[place][0] = 1, number
                slot.length += 1
                self.batch.logits[place] = slot.length == len(slot.ids)
                self.batch.n_tokens += 1
            if take and slot.length == len(slot.ids):
                places[number] = self.batch.n_tokens - 1
        return places

    def _tokens_left(self, number: int) -> int:
        slot = self.slots[number]
        return len(slot.ids) - slot.length

    def _next_token(self, number: int, place: int) -> None:
        slot = self.slots[number]
        token = self.llama_cpp.llama_sampler_sample(slot.sampler, self.context, place)
        slot.ids.append(token)
        slot.new_tokens += 1
        is_last = slot.new_tokens == slot.body["max_tokens"] or slot.is_gone
        slot.send(slot.decoder.decode(self.piece(token), is_last))
        if is_last:
            slot.send(None)
            self.llama_cpp.llama_sampler_free(slot.sampler)
            self.llama_cpp.llama_memory_seq_rm(self.memory, number, -1, -1)
            self.slots[number] = None


def llama_cpp_slots(options: argparse.Namespace) -> FastAPI:
    """Returns a server with llama.cpp's batches."""
    llama = Llama(options)
    threading.Thread(target=llama.run, daemon=True).start()

    async def events(body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
        loop, texts = asyncio.get_running_loop(), asyncio.Queue()
        prompt = body["prompt"]
        ids = llama.tokenize(prompt) if isinstance(prompt, str) else list(prompt)
        size = len(ids)
        slot = Slot(ids, body, lambda text: loop.call_soon_threadsafe(texts.put_nowait, text))
        llama.waiting.put(slot)
        try:
            while (text := await texts.get()) is not None:
                yield text_event(text)
            yield text_event("", "length")
            yield usage_event(size, slot.new_tokens)
        finally:
            slot.is_gone = True

    return make_app("llama.cpp-slots", events)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("kind", choices=["one-at-a-time", "llama.cpp-slots"])
    parser.add_argument("model", help="preset name or folder; a GGUF file for llama.cpp")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype")
    parser.add_argument("--quantization")
    parser.add_argument("--slots", type=int, default=8)
    parser.add_argument("--context", type=int, default=4096, help="tokens per slot")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    app = one_at_a_time(options) if options.kind == "one-at-a-time" else llama_cpp_slots(options)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
