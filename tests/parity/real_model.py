"""Writes `real_model.json`: what transformers and llama.cpp compute with the real Gemma 3 270M.

    python -m tests.parity.real_model

The judges take a minute to load the file, so `tests/test_real_model.py` reads their results from
`real_model.json`. llama.cpp tokenizes and continues prompts; transformers computes logits, and
lm-eval's model for transformers likelihoods of continuations, all from the same GGUF file. The
vocabulary is sampled to keep the file small. Losses depend on all of it.
"""

import importlib.metadata
import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).with_suffix(".json")
ROOT = Path(__file__).parents[2]
PRESET = "gemma3_270m_q4_k_m"

NUM_TOKENS = 640
"""Length of the text, above the window of 512."""
POSITIONS = [5, 100, 300, 511, 512, 513, 600, 639]
NUM_SAMPLED_IDS = 64
NUM_NEW_TOKENS = 24

PROMPTS = [
    "The capital of France is",
    "Photosynthesis is the process by which",
    "Once upon a time, in a small village by the sea,",
    "def fibonacci(n):\n",
    "To be, or not to be, that is",
    "Water boils at a temperature of",
    "The first president of the United States was",
    "1, 2, 3, 4, 5,",
    "Die Hauptstadt von Deutschland ist",
    "La recette de la tarte aux pommes",
    "El sol sale por",
    "import numpy as np\n\nx = np.",
    "<h1>Welcome</h1>\n<p>",
    "The opposite of hot is",
    "Dear Sir or Madam,\n",
    "Q: What is the largest planet?\nA:",
    "In 1969, astronauts",
    "日本の首都は",
    "Albert Einstein was born in",
    "The recipe needs two eggs, a cup of flour and",
]

QUESTION = "Question: Which of these is a source of light?\nAnswer:"
EXAMPLES = "Question: Is snow cold?\nAnswer: yes\n\nQuestion: Do fish fly?\nAnswer: no\n\n"
LIKELIHOODS = [
    (QUESTION, " the Sun"),
    (QUESTION, " a mirror on the wall"),
    (QUESTION, " the Moon"),
    (EXAMPLES + QUESTION, " the Sun"),
    (EXAMPLES + QUESTION, " the Moon"),
    (EXAMPLES + "Question: Is fire hot?\nAnswer:", " yes"),
    (EXAMPLES + "Question: Is fire hot?\nAnswer:", " no"),
    ("", "The capital of France is Paris."),
    ("The capital of France is ", "Paris"),
    ("1, 2, 3, 4, 5,", " 6, 7, 8"),
    ("def fibonacci(n):\n", "    if n <= 1:\n        return n"),
]
"""Contexts and continuations."""


def main() -> None:
    from keras_gemma.storage.hub.locate import resolve

    path = resolve(PRESET)
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    text, ids, answers = run_llama_cpp(path, text)
    results = {
        "versions": {
            name: importlib.metadata.version(name)
            for name in ("transformers", "torch", "llama-cpp-python", "lm-eval")
        },
        "text": text,
        "ids": ids,
        "answers": answers,
        **run_transformers(path, ids),
        "likelihoods": run_lm_eval(path),
    }
    RESULTS.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def run_llama_cpp(path: Path, text: str) -> tuple[str, list[int], list[dict[str, Any]]]:
    """Returns the start of `text`, its tokens, and the greedy continuations of `PROMPTS`."""
    import llama_cpp

    model = llama_cpp.Llama(str(path), n_ctx=NUM_TOKENS, logits_all=True, verbose=False)
    ids = model.tokenize(text.encode())[:NUM_TOKENS]
    answers = []
    for prompt in PROMPTS:
        prompt_ids = model.tokenize(prompt.encode())
        stream = model.generate(prompt_ids, temp=0.0, repeat_penalty=1.0)
        answer = [next(stream) for _ in range(NUM_NEW_TOKENS)]
        answers.append({"prompt": prompt, "ids": prompt_ids, "answer": answer})
    text = model.detokenize(ids).decode()
    model.close()
    return text, ids, answers


def run_transformers(path: Path, ids: list[int]) -> dict[str, Any]:
    """Returns logits in float32, and losses in float32 and bfloat16."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype="float32")
    tokens = torch.tensor([ids])
    with torch.no_grad():
        logits = model(tokens).logits[0]
        low = model.bfloat16()(tokens).logits[0].float()
    sampled = np.random.default_rng(0).choice(logits.shape[1], NUM_SAMPLED_IDS, replace=False)
    return {
        "sampled_ids": sampled.tolist(),
        "logits": [[round(x, 5) for x in logits[at][sampled].tolist()] for at in POSITIONS],
        "largest_logit": logits.abs().max().item(),
        "losses": losses_of(logits, tokens[0]),
        "losses_bfloat16": losses_of(low, tokens[0]),
    }


def run_lm_eval(path: Path) -> list[tuple[float, bool]]:
    """Returns the log-probability of each of `LIKELIHOODS`, and whether it is the greedy text."""
    from lm_eval.api.instance import Instance
    from lm_eval.models.huggingface import HFLM
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = {"pretrained_model_name_or_path": path.parent, "gguf_file": path.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(**source)
    lm = HFLM(pretrained=model, tokenizer=tokenizer, device="cpu", add_bos_token=True)
    requests = [Instance("loglikelihood", {}, pair, 0) for pair in LIKELIHOODS]
    answers = lm.loglikelihood(requests, disable_tqdm=True)
    return [(round(log_probability, 5), greedy) for log_probability, greedy in answers]


def losses_of(logits: Any, tokens: Any) -> list[float]:
    import torch

    losses = torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")
    return [round(x, 5) for x in losses.tolist()]


if __name__ == "__main__":
    main()
