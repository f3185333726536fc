"""How many held-out items of `instruct_data.py` a model answers exactly, by skill.

    python examples/instruct_accuracy.py gemma_tiny_instruct_en instruct/held_out.jsonl

Decoding is greedy, and an answer counts only where every character is right and it ends by itself.
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path

from keras_gemma.models import GemmaCausalLM


def measure(lm: GemmaCausalLM, items: list[dict], batch_size: int = 100) -> dict[str, list[bool]]:
    """For each skill, whether each of its items is answered; wrong answers are printed."""
    right = defaultdict(list)
    for start in range(0, len(items), batch_size):
        batch = items[start : start + batch_size]
        questions = [item["messages"][:-1] for item in batch]
        replies = lm.generate_chat(
            questions, max_new_tokens=96, sampler="greedy", return_logprobs=1
        )
        for item, reply in zip(batch, replies, strict=True):
            wanted = item["messages"][-1]["content"]
            good = reply.text == wanted and reply.finish_reason == "stop"
            right[item["skill"]].append(good)
            if not good:
                question = item["messages"][-2]["content"]
                print(f"{item['skill']}: {question!r}: {reply.text!r}, not {wanted!r}")
    return right


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a preset's name or folder")
    parser.add_argument("held_out", type=Path, help="held_out.jsonl, of instruct_data.py")
    options = parser.parse_args()
    items = [json.loads(line) for line in options.held_out.read_text("utf-8").splitlines()]
    right = measure(GemmaCausalLM.from_preset(options.model), items)
    print("\n| skill | held-out items | exact |\n|---|---|---|")
    for skill, answers in right.items():
        print(f"| {skill} | {len(answers)} | {sum(answers) / len(answers):.1%} |")


if __name__ == "__main__":
    main()
