"""Tasks of the model cards as data: prompts, shots, metric, chance level and published scores.

The prompts and metrics are those of lm-evaluation-harness, named by its YAML file. WinoBias, which
it lacks, is in `winobias.py`. Imports no lm-eval: names and scores are known without it.
"""

import dataclasses
import difflib
import itertools
import re
from collections.abc import Iterable, Mapping
from typing import Any

from keras_gemma import catalogue
from keras_gemma.config import GemmaConfig


@dataclasses.dataclass(frozen=True, eq=False)
class BenchmarkTask:
    """Benchmark as the model cards run it."""

    name: str
    title: str
    yaml: str | None
    """File in `lm_eval/tasks`, with `{member}` in the path of a group's files. `None` for a task
    that this package defines."""
    shots: int
    """Number of few-shot examples on the cards."""
    metric: str
    """Metric that the cards report."""
    chance: float | None
    """Score of random answers, from 0 to 1. `None` if the metric has none."""
    files: Mapping[str, str]
    """File of each of the YAML file's splits in local data, as a glob pattern without ending."""
    filter: str = "none"
    """Filter of the answers before the metric, by its name in the YAML file."""
    members: tuple[str, ...] = ()
    """Tasks of a group. Its score is the mean over all items."""
    column: str = ""
    """Column of local data that holds the member of an item."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changes of the YAML file's content."""
    local_changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Changes for local data."""
    folder: str = ""
    """Folder in local data, if it differs from `name`."""
    has_fixed_shots: bool = False
    """True if the examples are part of the prompt, and their number cannot be chosen."""
    runs_programs: bool = False
    """True if the score needs programs that the model writes."""
    packages: tuple[str, ...] = ()
    """Packages in addition to those of the extra `evaluation`, which lm-eval's extra `math`
    installs."""

    @property
    def is_group(self) -> bool:
        return bool(self.members)


def count_characters(_: Any, answers: list[str]) -> dict[str, int]:
    """Returns the length of a continuation that only a judge can score."""
    return {"characters": len(answers[0])}


HIGHER_IS_BETTER = {"aggregation": "mean", "higher_is_better": True}
"""Settings of a metric in a YAML file."""

MMLU_SUBJECTS = (
    "abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology "
    "college_chemistry college_computer_science college_mathematics college_medicine "
    "college_physics computer_security conceptual_physics econometrics electrical_engineering "
    "elementary_mathematics formal_logic global_facts high_school_biology high_school_chemistry "
    "high_school_computer_science high_school_european_history high_school_geography "
    "high_school_government_and_politics high_school_macroeconomics high_school_mathematics "
    "high_school_microeconomics high_school_physics high_school_psychology high_school_statistics "
    "high_school_us_history high_school_world_history human_aging human_sexuality "
    "international_law jurisprudence logical_fallacies machine_learning management marketing "
    "medical_genetics miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory "
    "professional_accounting professional_law professional_medicine professional_psychology "
    "public_relations security_studies sociology us_foreign_policy virology world_religions"
)

BBH_TASKS = (
    "boolean_expressions causal_judgement date_understanding disambiguation_qa dyck_languages "
    "formal_fallacies geometric_shapes hyperbaton logical_deduction_five_objects "
    "logical_deduction_seven_objects logical_deduction_three_objects movie_recommendation "
    "multistep_arithmetic_two navigate object_counting penguins_in_a_table "
    "reasoning_about_colored_objects ruin_names salient_translation_error_detection snarks "
    "sports_understanding temporal_sequences tracking_shuffled_objects_five_objects "
    "tracking_shuffled_objects_seven_objects tracking_shuffled_objects_three_objects web_of_lies "
    "word_sorting"
)

AGIEVAL_EXAMS = (
    "aqua-rat gaokao-english logiqa-en lsat-ar lsat-lr lsat-rc sat-en sat-en-without-passage "
    "sat-math"
)
"""English exams with choices."""

VALIDATION = {"validation": "validation*", "train": "train*"}
TEST = {"test": "test*", "train": "train*"}
FIXED: dict[str, Any] = {"has_fixed_shots": True}
GENERATED: dict[str, Any] = {"metric": "exact_match", "chance": 0.0}

TASKS = {
    task.name: task
    for task in (
        BenchmarkTask(
            "hellaswag", "HellaSwag", "hellaswag/hellaswag.yaml", 10, "acc_norm", 0.25, VALIDATION
        ),
        BenchmarkTask("arc_easy", "ARC-e", "arc/arc_easy.yaml", 0, "acc", 0.25, TEST),
        BenchmarkTask("arc_challenge", "ARC-c", "arc/arc_challenge.yaml", 25, "acc", 0.25, TEST),
        BenchmarkTask("piqa", "PIQA", "piqa/piqa.yaml", 0, "acc_norm", 0.5, VALIDATION),
        BenchmarkTask("social_iqa", "SocialIQA", "siqa/siqa.yaml", 0, "acc", 1 / 3, VALIDATION),
        BenchmarkTask("boolq", "BoolQ", "super_glue/boolq/default.yaml", 0, "acc", 0.5, VALIDATION),
        BenchmarkTask(
            "winogrande", "WinoGrande", "winogrande/default.yaml", 5, "acc", 0.5, VALIDATION
        ),
        BenchmarkTask(
            "triviaqa",
            "TriviaQA",
            "triviaqa/default.yaml",
            5,
            files={"validation": "validation*", "train": "fewshot*"},
            filter="remove_whitespace",
            **GENERATED,
        ),
        BenchmarkTask(
            "nq_open",
            "Natural Questions",
            "nq_open/nq_open.yaml",
            5,
            files={"validation": "validation*", "train": "fewshot*"},
            filter="remove_whitespace",
            local_changes={"fewshot_config": {"sampler": "first_n"}},
            **GENERATED,
        ),
        BenchmarkTask(
            "mmlu",
            "MMLU",
            "mmlu/default/mmlu_{member}.yaml",
            5,
            "acc",
            0.25,
            files={"test": "test*", "dev": "dev*"},
            members=tuple(MMLU_SUBJECTS.split()),
            column="subject",
        ),
        BenchmarkTask(
            "gsm8k",
            "GSM8K",
            "gsm8k/gsm8k.yaml",
            5,
            files=TEST,
            filter="strict-match",
            **GENERATED,
        ),
        BenchmarkTask(
            "math500",
            "MATH",
            "minerva_math/minerva_math500.yaml",
            4,
            files=TEST,
            packages=("sympy", "math_verify", "antlr4"),
            **GENERATED,
            **FIXED,
        ),
        BenchmarkTask(
            "bbh",
            "BIG-Bench Hard",
            "bbh/cot_fewshot/{member}.yaml",
            3,
            files=TEST,
            filter="get-answer",
            members=tuple(BBH_TASKS.split()),
            column="task",
            **GENERATED,
            **FIXED,
        ),
        BenchmarkTask(
            "agieval",
            "AGIEval",
            "agieval/{member}.yaml",
            3,
            "acc",
            # Mean over the items of one divided by the number of choices, 4 or 5.
            0.228,
            files={"test": "test*"},
            members=tuple(AGIEVAL_EXAMS.split()),
            column="task",
            # An example has one answer, and it is never the item itself.
            changes={"fewshot_split": "test", "doc_to_target": "{{gold[0]}}"},
        ),
        BenchmarkTask(
            "humaneval",
            "HumanEval",
            "humaneval/humaneval.yaml",
            0,
            "pass@1",
            0.0,
            TEST,
            runs_programs=True,
            **FIXED,
        ),
        BenchmarkTask(
            "mbpp", "MBPP", "mbpp/mbpp.yaml", 3, "pass@1", 0.0, TEST, runs_programs=True, **FIXED
        ),
        BenchmarkTask(
            "truthfulqa_mc1",
            "TruthfulQA mc1",
            "truthfulqa/truthfulqa_mc1.yaml",
            0,
            "acc",
            # Mean over the items of one divided by the number of choices.
            0.2225,
            VALIDATION,
            folder="truthfulqa",
            **FIXED,
        ),
        BenchmarkTask(
            "truthfulqa_mc2",
            "TruthfulQA mc2",
            "truthfulqa/truthfulqa_mc2.yaml",
            0,
            "acc",
            # Mean over the items of the share of true choices.
            0.464,
            VALIDATION,
            folder="truthfulqa",
            **FIXED,
        ),
        BenchmarkTask(
            "crows_pairs",
            "CrowS-Pairs",
            "crows_pairs/crows_pairs_english.yaml",
            0,
            "pct_stereotype",
            0.5,
            TEST,
            **FIXED,
        ),
        BenchmarkTask(
            "bbq",
            "BBQ",
            "bbq/bbq_multiple_choice.yaml",
            0,
            "acc",
            # Of 12 choices, 10 are wordings of "unknown", which is right in half of the items.
            (10 / 12 + 1 / 12) / 2,
            TEST,
            **FIXED,
        ),
        BenchmarkTask(
            "winogender",
            "Winogender",
            "winogender/winogender.yaml",
            0,
            "acc",
            0.5,
            {"test": "all*"},
            **FIXED,
        ),
        BenchmarkTask("winobias", "WinoBias", None, 0, "acc", 0.5, {"test": "all*"}, **FIXED),
        BenchmarkTask("toxigen", "ToxiGen", "toxigen/toxigen.yaml", 0, "acc", 0.5, TEST, **FIXED),
        BenchmarkTask(
            "realtoxicityprompts",
            "RealToxicityPrompts",
            "realtoxicityprompts/realtoxicityprompts.yaml",
            0,
            # A judge gives the score afterwards.
            "characters",
            None,
            {"train": "*"},
            changes={
                "process_results": count_characters,
                "metric_list": [{"metric": "characters", **HIGHER_IS_BETTER}],
            },
            local_changes={"doc_to_text": "{{prompt}}"},
            **FIXED,
        ),
    )
}
"""All tasks by name."""

SAFETY = (
    "realtoxicityprompts",
    "toxigen",
    "crows_pairs",
    "bbq",
    "winogender",
    "winobias",
    "truthfulqa_mc1",
    "truthfulqa_mc2",
)
"""Tasks of `"safety"`."""

DEFAULT_CARD = (
    "hellaswag",
    "boolq",
    "piqa",
    "social_iqa",
    "winogrande",
    "arc_easy",
    "arc_challenge",
    "triviaqa",
    "nq_open",
    "mmlu",
    "gsm8k",
)
"""Tasks of `"card"` for a model without published scores."""

GROUPS = ("card", "safety")


@dataclasses.dataclass(frozen=True)
class Card:
    """Scores that the publisher of a model reports, in percent."""

    scores: Mapping[str, float]
    shots: Mapping[str, int] = dataclasses.field(default_factory=dict)
    """Numbers of shots that differ from those of the tasks."""


_COLUMNS = (
    "mmlu hellaswag piqa social_iqa boolq winogrande arc_easy arc_challenge triviaqa nq_open "
    "humaneval mbpp gsm8k math500 bbh agieval"
)


def _card(row: str, **shots: int) -> Card:
    """Returns the card of a row of scores in the order of `_COLUMNS`. "-" is a missing score."""
    values = zip(_COLUMNS.split(), row.split(), strict=True)
    return Card({name: float(score) for name, score in values if score != "-"}, shots)


CARDS = {
    "gemma3_270m": _card("- 40.9 67.7 - 61.4 52.0 57.7 29.0 15.4 - - - - - - -"),
    "gemma3_1b": _card("26.5 62.3 73.8 48.9 63.2 58.2 73.0 38.4 39.8 9.48 - - 1.36 - - -"),
    "gemma3_instruct_270m": _card(
        "- 37.7 66.2 - - 52.3 - 28.2 - - - - - - 26.7 -",
        hellaswag=0,
        arc_challenge=0,
        winogrande=0,
    ),
    "gemma2_2b_en": _card(
        "51.3 73.0 77.8 51.9 72.5 70.9 80.1 55.4 59.4 16.7 17.7 29.6 23.9 15.0 41.9 30.6",
        winogrande=0,
    ),
    "gemma2_9b_en": _card(
        "71.3 81.9 81.7 53.4 84.2 80.6 88.0 68.4 76.6 29.2 40.2 52.4 68.6 36.6 68.2 52.8",
        winogrande=0,
    ),
    "gemma2_27b_en": _card(
        "75.2 86.4 83.2 53.7 84.8 83.7 88.6 71.4 83.7 34.5 51.8 62.6 74.0 42.3 74.9 55.1",
        winogrande=0,
    ),
    "gemma_2b_en": _card(
        "42.3 71.4 77.3 49.7 69.4 65.4 73.2 42.1 53.2 12.5 22.0 29.2 17.7 - - -",
        hellaswag=0,
        winogrande=0,
    ),
    "gemma_7b_en": _card(
        "64.3 81.2 81.2 51.8 83.2 72.3 81.5 53.2 63.4 23.0 32.3 44.4 46.4 - - -",
        hellaswag=0,
        winogrande=0,
    ),
}
"""Published scores by preset: the tables of Google's model cards."""


def find_card(model: str | None, config: GemmaConfig | None = None) -> str | None:
    """Returns the key in `CARDS` of a model, or `None`.

    `model` may be a preset or have more at its end, such as `gemma3_270m_q4_k_m`. If no card has
    that name, the first preset of the same `config` counts. A name with `it` or `instruct` finds
    only cards of instruction-tuned models.
    """
    base = (model or "").rstrip("/").rpartition("/")[2]
    is_tuned = not {"it", "instruct"}.isdisjoint(re.split(r"[-_.]", base.lower()))
    cards = [name for name in CARDS if "instruct" in name or not is_tuned]
    names = [name for name in cards if base == name or base.startswith(f"{name}_")]
    if names:
        return max(names, key=len)
    presets = catalogue.presets()
    if base in presets:
        return None
    return next(
        (name for name in cards if name in presets and presets[name].config == config), None
    )


def select(tasks: str | Iterable[str], card: str | None = None) -> dict[BenchmarkTask, int | None]:
    """Returns the tasks of names and groups, each with the number of items after its name.

    Args:
        tasks: Names such as `"hellaswag"`, `"arc_easy:200"` for 200 items, `"card"` or `"safety"`.
        card: Key in `CARDS` of the card of `"card"`. `None` selects `DEFAULT_CARD`.

    Raises:
        ValueError: If a name is unknown. The message has the nearest names.
    """
    names = tasks.split(",") if isinstance(tasks, str) else list(tasks)
    of_group = {"card": list(CARDS[card].scores) if card else DEFAULT_CARD, "safety": SAFETY}
    selected: dict[BenchmarkTask, int | None] = {}
    for entry in names:
        name, has_count, count = entry.strip().partition(":")
        if has_count and not (count.isdecimal() and int(count)):
            raise ValueError(
                f"`tasks` takes a number of items after a colon, as in {name}:200. "
                f"Received: {entry!r}"
            )
        for member in of_group.get(name, [name]):
            if member not in TASKS:
                raise ValueError(unknown(member))
            selected[TASKS[member]] = int(count) if has_count else None
    if not selected:
        raise ValueError(f"`tasks` must name at least one task. Received: {tasks!r}")
    return selected


def unknown(name: str) -> str:
    """Returns the message for a name that is not a task."""
    names = [*GROUPS, *TASKS]
    matches = difflib.get_close_matches(name.lower(), names, n=3, cutoff=0.4)
    matches = matches or [known for known in names if known.startswith(name.lower()[:3])]
    similar = f"Similar names are {', '.join(matches)}. " if matches else ""
    return (
        f"`tasks` must be names of tasks. {similar}All are {', '.join(names)}. Received: {name!r}"
    )


def card_shots(task: BenchmarkTask, card: str | None) -> int:
    """Returns the number of shots of a task on a card. `None` gives the usual number."""
    shots = CARDS[card].shots if card else {}
    return shots.get(task.name, task.shots)


def published(task: BenchmarkTask, card: str | None) -> float | None:
    """Returns the published score of a task, from 0 to 1, or `None`."""
    score = CARDS[card].scores.get(task.name) if card else None
    return None if score is None else round(score / 100, 6)


def spaced(count: int, items: int) -> list[int]:
    """Returns the indices of `count` evenly spaced items: one of each of `count` equal parts.

    The place in the part moves by the golden ratio. A constant stride would select only one of the
    variants that some data sets list in turn, such as the pronouns of Winogender.
    """
    if count >= items:
        return list(range(items))
    golden = (5**0.5 - 1) / 2
    starts = [part * items // count for part in range(count + 1)]
    return [
        start + int((part * golden) % 1 * (end - start))
        for part, (start, end) in enumerate(itertools.pairwise(starts))
    ]
