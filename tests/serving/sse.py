"""Reads server-sent events, strictly as the standard frames them."""

import json


def events(response):
    """Returns name and data of each event. `[DONE]` stays a string."""
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["cache-control"] == "no-cache"
    assert response.headers["x-accel-buffering"] == "no"
    text = response.text
    assert text.endswith("\n\n")
    return [read(block) for block in text[:-2].split("\n\n")]


def read(block):
    name = None
    *heads, data = block.split("\n")
    if heads:
        (head,) = heads
        assert head.startswith("event: ")
        name = head.removeprefix("event: ")
    assert data.startswith("data: ")
    data = data.removeprefix("data: ")
    return name, data if data == "[DONE]" else json.loads(data)


def chunks(response):
    """Returns the data of OpenAI's events before `[DONE]`, which must be the last."""
    *items, last = events(response)
    assert last == (None, "[DONE]")
    assert all(name is None for name, _ in items)
    return [data for _, data in items]
