"""Exact-match accuracy of a model on the held-out items of `instruct_data.py`, by skill.

    python examples/instruct_accuracy.py gemma_tiny_instruct_en instruct/held_out.jsonl

Decoding is greedy. An answer is correct if all characters match and it ends with a stop token.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from keras_gemma.models import GemmaCausalLM


def measure(lm: GemmaCausalLM, items: list[dict], batch_size: int = 100) -> dict[str, list[bool]]:
    """Returns True for each item with a correct answer, by skill. Prints the other answers."""
    correct = defaultdict(list)
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        questions = [item["messages"][:-1] for item in batch]
        replies = lm.generate_chat(
            questions, max_new_tokens=96, sampler="greedy", return_logprobs=1
        )
        for item, reply in zip(batch, replies, strict=True):
            expected = item["messages"][-1]["content"]
            is_correct = reply.text == expected and reply.finish_reason == "stop"
            correct[item["skill"]].append(is_correct)
            if not is_correct:
                question = item["messages"][-2]["content"]
                print(f"{item['skill']}: {question!r}: {reply.text!r}, not {expected!r}")
    return correct


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="name or folder of a preset")
    parser.add_argument("held_out", type=Path, help="held_out.jsonl, written by instruct_data.py")
    options = parser.parse_args()
    items = [json.loads(line) for line in options.held_out.read_text("utf-8").splitlines()]
    correct = measure(GemmaCausalLM.from_preset(options.model), items)
    print("\n| skill | held-out items | exact |\n|---|---|---|")
    for skill, answers in correct.items():
        print(f"| {skill} | {len(answers)} | {sum(answers) / len(answers):.1%} |")


if __name__ == "__main__":
    main()
