"""Calls serve_saved_model.py, with only the standard library.

python examples/exported/call_saved_model.py http://localhost:8000 "ROMEO:" --max-new-tokens 40
"""

import argparse
import json
import urllib.error
import urllib.request
from typing import Any


def call(address: str, **request: Any) -> dict[str, Any]:
    """The answer to `request`; ValueError with the server's sentence where it refuses."""
    body = json.dumps(request).encode()
    headers = {"Content-Type": "application/json"}
    try:
        with urllib.request.urlopen(urllib.request.Request(address, body, headers)) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        with error:
            raise ValueError(json.load(error)["error"]) from error


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("server")
    parser.add_argument("prompts", nargs="+")
    parser.add_argument("--max-new-tokens", type=int, default=40)
    parser.add_argument("--temperature", type=float, default=0.0)
    options = parser.parse_args()
    answer = call(
        f"{options.server}/generate",
        prompts=options.prompts,
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
    )
    for completion in answer["completions"]:
        print(completion["text"])


if __name__ == "__main__":
    main()
