"""Built-in instruction-tuned preset: skills, follow-up turns, end of a reply."""

from pathlib import Path

import pytest

from keras_gemma import GemmaCausalLM

EXAMPLES = Path(__file__).parents[2] / "examples"

ANSWERS = {
    "What is 17 + 8?": "25",
    "Spell garden.": "g-a-r-d-e-n",
    "Reverse kitten.": "nettik",
    "How many letters are in banana?": "6",
    "Count to 7.": "1 2 3 4 5 6 7",
    "What is the capital of France?": "Paris.",
    "What is the capital of Atlantis?": "I do not know that capital.",
    "Hello!": "Hello!",
    "What can you do?": "I am a tiny model: I can add, spell, reverse, count and name capitals.",
    "Thank you!": "You are welcome.",
}


@pytest.fixture(scope="module")
def lm():
    return GemmaCausalLM.from_preset("gemma_tiny_instruct_en")


def ask(question):
    return [{"role": "user", "content": question}]


def test_answers_and_stops(lm):
    replies = lm.generate_chat([ask(question) for question in ANSWERS], return_logprobs=1)
    answers = {question: reply.text for question, reply in zip(ANSWERS, replies, strict=True)}
    assert answers == ANSWERS
    assert {reply.finish_reason for reply in replies} == {"stop"}


@pytest.mark.parametrize(
    ("system", "turns"),
    [
        (None, {"Spell window.": "w-i-n-d-o-w", "And backwards?": "wodniw", "And apple?": "elppa"}),
        (None, {"What is 12 + 9?": "21", "Add 3 to that.": "24", "And 5 more?": "29"}),
        (None, {"What is the capital of Spain?": "Madrid.", "And of Italy?": "Rome."}),
        ("Answer in capitals.", {"Spell window.": "W-I-N-D-O-W", "Now backwards.": "WODNIW"}),
    ],
)
def test_follow_up_turns(system, turns, lm):
    chat = lm.chat(system)
    assert {question: chat.send(question) for question in turns} == turns
