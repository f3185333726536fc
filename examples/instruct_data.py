"""Writes conversations for a tiny instruction model: training data and held-out items.

    python examples/instruct_data.py instruct

The same arguments give the same bytes:

    drills.jsonl     sums, words spelled, reversed and counted; conversations about the same skills
    short.jsonl      conversations of about 128 tokens with all skills and one or more turns
    long.jsonl       conversations of about 256 tokens with more sums
    last.jsonl       conversations of about 128 tokens with more letters and more follow-up turns
    held_out.jsonl   items for evaluation: {"skill": ..., "messages": [...]}

The training data contains none of the held-out words, ordered pairs of numbers, and, for the other
skills, phrases. Knows no model and no tokens. The words are in `instruct_phrases.py`.
"""

import argparse
import hashlib
import json
import random
from pathlib import Path
from typing import NamedTuple

from instruct_phrases import (
    CAPITALS,
    CHATTER,
    ELSE,
    FIRST,
    FOLLOW_UPS,
    HELD_OUT_CHATTER,
    HELD_OUT_PHRASES,
    HELLO,
    LAST,
    MIDDLE,
    OTHER_COUNTRIES,
    PHRASES,
    SHOUT,
    UNKNOWN_CAPITAL,
    WORDS,
)

MAX_SUMMAND = 20
"""Largest summand of a first turn."""

MAX_COUNT = 12
"""Largest number to count to."""


class Turn(NamedTuple):
    """Question and answer with their skill, and what the next turn may refer to."""

    skill: str
    question: str
    answer: str
    word: str | None = None
    number: int | None = None
    country: str | None = None


def options(text: str) -> list[str]:
    """Returns the phrases of a table cell."""
    return [phrase.strip() for phrase in text.split("|")]


class Writer:
    """Generator of turns and conversations, from the training items or from the held-out ones."""

    def __init__(self, held_out: bool, seed: int, last: bool = False) -> None:
        self.held_out, self.last = held_out, last
        self.random = random.Random(f"{seed} {held_out}{' last' if last else ''}")
        chance = random.Random(seed)
        self.held_out_words = set(chance.sample(WORDS, len(WORDS) // 3))
        # Pairs of single digits are never held out.
        pairs = [(a, b) for b in range(10, MAX_SUMMAND + 1) for a in range(b)]
        pairs = chance.sample(pairs, len(pairs) // 8)
        self.held_out_pairs = {pair if chance.random() < 0.5 else pair[::-1] for pair in pairs}
        self.held_out_countries = set(chance.sample(OTHER_COUNTRIES, len(OTHER_COUNTRIES) // 3))

    def phrase(self, table: dict, name: str, held_out_table: dict | None = None) -> str:
        """Returns a random phrase, from the held-out table if there is one for this writer."""
        chosen = held_out_table if self.held_out and held_out_table else table
        return self.random.choice(options(chosen[name]))

    def word(self) -> str:
        """Returns a random word. In training, most have no meaning, so that letters matter."""
        if self.held_out:
            return self.random.choice(sorted(self.held_out_words))
        while True:
            real = self.random.random() < (0.1 if self.last else 0.25)
            word = self.random.choice(WORDS) if real else self.nonsense()
            if word not in self.held_out_words:
                return word.capitalize() if self.random.random() < 0.1 else word

    def nonsense(self) -> str:
        """Returns a made-up word of 2 to 7 letters."""
        if self.random.random() < (0.6 if self.last else 0.2):
            letters = "abcdefghijklmnopqrstuvwxyz"
            return "".join(self.random.choices(letters, k=self.random.randint(2, 7)))
        word = ""
        for _ in range(self.random.choice([1, 1, 2, 2, 2, 3])):
            word += self.random.choice(FIRST) + self.random.choice(MIDDLE)
        return (word + self.random.choice(LAST))[: self.random.choice([4, 5, 6, 7, 7])]

    def pair(self) -> tuple[int, int]:
        """Returns two numbers to add."""
        while True:
            top = self.random.choice([9, MAX_SUMMAND, MAX_SUMMAND])
            a, b = self.random.randint(0, top), self.random.randint(0, top)
            if self.may_add(a, b):
                return a, b

    def may_add(self, a: int, b: int) -> bool:
        """Returns True if the pair belongs to this writer: held out, or for training."""
        return ((a, b) in self.held_out_pairs) == self.held_out

    def country(self) -> str:
        """Returns a country of `CAPITALS`, or sometimes another one."""
        if self.random.random() > 0.12:
            return self.random.choice(list(CAPITALS))
        for_training = sorted(set(OTHER_COUNTRIES) - self.held_out_countries)
        return self.random.choice(
            sorted(self.held_out_countries) if self.held_out else for_training
        )

    def about_word(self, skill: str, phrase: str, word: str) -> Turn:
        """Returns a turn about the letters of a word."""
        answers = {
            "spell": "-".join(word),
            "reverse": word[::-1],
            "letters": str(len(word)),
        }
        return Turn(skill, phrase.format(w=word), answers[skill], word=word)

    def about_capital(self, phrase: str) -> Turn:
        """Returns a turn about a country."""
        country = self.country()
        answer = f"{CAPITALS[country]}." if country in CAPITALS else UNKNOWN_CAPITAL
        return Turn("capital", phrase.format(c=country), answer, country=country)

    def opening(self, skill: str) -> Turn:
        """Returns a turn that does not refer to another."""
        if skill in ("spell", "reverse", "letters"):
            word = self.word()
            quoted = self.random.choice([word] * 8 + [f'"{word}"', f"'{word}'"])
            turn = self.about_word(skill, "{w}", word)
            return turn._replace(question=self.phrase(PHRASES, skill).format(w=quoted))
        if skill == "capital":
            return self.about_capital(self.phrase(PHRASES, skill, HELD_OUT_PHRASES))
        if skill == "count":
            n = self.random.randint(1, MAX_COUNT)
            question = self.phrase(PHRASES, skill, HELD_OUT_PHRASES).format(n=n)
            return Turn(skill, question, " ".join(map(str, range(1, n + 1))))
        if skill == "add":
            a, b = self.pair()
            question = self.phrase(PHRASES, skill).format(a=a, b=b)
            return Turn(skill, question, str(a + b), number=a + b)
        answer = self.random.choice([HELLO, ELSE, ELSE, ELSE, ELSE, "You are welcome.", "Goodbye!"])
        question = self.phrase(CHATTER, answer, HELD_OUT_CHATTER).format(
            a=self.random.randint(0, 99),
            b=self.random.randint(0, 99),
            w=self.word(),
            c=self.random.choice([*CAPITALS, *OTHER_COUNTRIES]),
        )
        return Turn("chatter", question, answer)

    def follow_up(self, before: Turn) -> Turn | None:
        """Returns a turn that refers to the one before, or `None` if that is not possible."""
        if before.number is not None:
            largest = min(MAX_SUMMAND, 2 * MAX_SUMMAND - before.number)
            steps = [n for n in range(largest + 1) if self.may_add(before.number, n)]
            if not steps:
                return None
            n = self.random.choice(steps)
            question = self.phrase(FOLLOW_UPS, "add").format(n=n)
            return Turn("add", question, str(before.number + n), number=before.number + n)
        if before.country is not None:
            return self.about_capital(self.phrase(FOLLOW_UPS, "capital"))
        if before.word is not None:
            if self.random.random() < 0.25:
                return self.about_word(before.skill, self.phrase(FOLLOW_UPS, "word"), self.word())
            others = [s for s in ("spell", "reverse", "letters") if s != before.skill]
            skill = self.random.choice(others)
            return self.about_word(skill, self.phrase(FOLLOW_UPS, skill), before.word)
        return None

    def drill(self, length: int) -> str:
        """Returns lines of sums, or of words spelled, reversed and counted, without questions."""
        lines, size, sums = [], 0, self.random.random() < 0.5
        while True:
            if sums:
                a, b = self.pair()
                lines.append(f"{a} + {b} = {a + b}")
            else:
                word = self.word()
                lines.append(f"{word} {'-'.join(word)} {word[::-1]} {len(word)}")
            size += len(lines[-1]) + 1
            if size > length:
                return "\n".join(lines[:-1])

    def messages(self, turn: Turn, shout: bool) -> list[dict[str, str]]:
        """Returns the messages of a turn. Some questions lose capitals or the last punctuation."""
        question = turn.question
        if self.random.random() < 0.25 and (turn.word is None or turn.word.islower()):
            question = question.lower()
        if self.random.random() < 0.25 and len(question) > 1:
            question = question.rstrip("?.!")
        answer = turn.answer.upper() if shout else turn.answer
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    def conversation(self, length: int, shares: dict[str, int]) -> list[dict[str, str]]:
        """Returns messages of one turn, or of several with at most `length` tokens in total."""
        shout = self.random.random() < 0.15
        messages, turn = self.system(shout), None
        while True:
            before = turn if self.random.random() < (0.7 if self.last else 0.5) else None
            turn = before and self.follow_up(before)
            if turn is None:
                turn = self.opening(*self.random.choices(list(shares), shares.values()))
            new_messages = self.messages(turn, shout)
            if messages[1:] and count_tokens(messages + new_messages) > length:
                return messages
            messages += new_messages

    def system(self, shout: bool) -> list[dict[str, str]]:
        """Returns the system message that asks for capitals, or no message."""
        return [{"role": "system", "content": self.random.choice(SHOUT)}] if shout else []

    def items(self, name: str, count: int) -> list[dict]:
        """Returns held-out items of a skill, of kind `second turn` or of kind `in capitals`."""
        items = []
        while len(items) < count:
            shout, second = name == "in capitals", name == "second turn"
            skills = [s for s in SHARES if not (second and s in ("count", "chatter"))]
            turn = self.opening(self.random.choice(skills) if shout or second else name)
            messages = self.system(shout) + self.messages(turn, shout)
            if second:
                turn = self.follow_up(turn)
                if turn is None:
                    continue
                messages += self.messages(turn, shout)
            item = {"skill": name, "messages": messages}
            if item not in items:
                items.append(item)
        return items


SHARES = {"add": 7, "spell": 3, "reverse": 6, "letters": 3, "count": 3, "capital": 4, "chatter": 4}
"""Skill to its relative frequency in training."""

MORE_SUMS = {**SHARES, "add": 12}
"""Frequencies with more sums, which take longest to learn."""

MORE_LETTERS = {**SHARES, "add": 4, "spell": 8, "reverse": 12, "letters": 6}
"""Frequencies with more letters."""

LETTERS_AND_SUMS = {skill: SHARES[skill] for skill in ("add", "spell", "reverse", "letters")}
"""Frequencies of the skills that take long to learn."""


def count_tokens(messages: list[dict[str, str]]) -> int:
    """Returns about how many tokens messages have if each character is one."""
    return sum(len(message["content"]) + 9 for message in messages)


def write(path: Path, records: list[dict]) -> None:
    """Writes one line of JSON per record."""
    lines = [json.dumps(record) + "\n" for record in records]
    path.write_text("".join(lines), encoding="utf-8")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()[:16]
    print(f"{path}: {len(records)} lines, SHA-256 {digest}")


def make(
    folder: Path,
    drills: int,
    conversations: int,
    longer: int,
    lasts: int,
    each: int,
    length: int,
    seed: int,
) -> None:
    """Writes the five files."""
    folder.mkdir(parents=True, exist_ok=True)
    train = Writer(held_out=False, seed=seed)
    records = [{"text": train.drill(length)} for _ in range(drills)]
    records += [{"messages": train.conversation(length, LETTERS_AND_SUMS)} for _ in range(drills)]
    write(folder / "drills.jsonl", records)
    records = [{"messages": train.conversation(length, SHARES)} for _ in range(conversations)]
    write(folder / "short.jsonl", records)
    records = [{"messages": train.conversation(2 * length, MORE_SUMS)} for _ in range(longer)]
    write(folder / "long.jsonl", records)
    last = Writer(held_out=False, seed=seed, last=True)
    records = [{"messages": last.conversation(length, MORE_LETTERS)} for _ in range(lasts)]
    write(folder / "last.jsonl", records)
    held_out = Writer(held_out=True, seed=seed)
    kinds = [*SHARES, "second turn", "in capitals"]
    write(folder / "held_out.jsonl", [i for name in kinds for i in held_out.items(name, each)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="folder to write")
    parser.add_argument(
        "--drills",
        type=int,
        default=11000,
        help="number of drills, and of conversations about the same skills",
    )
    parser.add_argument("--conversations", type=int, default=96000, help="number in short.jsonl")
    parser.add_argument("--longer", type=int, default=5000, help="number in long.jsonl")
    parser.add_argument("--lasts", type=int, default=45000, help="number in last.jsonl")
    parser.add_argument("--each", type=int, default=100, help="number of held-out items per skill")
    parser.add_argument("--length", type=int, default=128, help="maximum number of tokens per text")
    parser.add_argument("--seed", type=int, default=0)
    make(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
