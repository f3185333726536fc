"""The tasks as data, and their prompts compared with lm-eval's own."""

import itertools
import json
import lzma

import datasets
import pytest
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from lm_eval.tasks.bbq import utils as bbq

from keras_gemma import catalogue, evaluation
from keras_gemma.evaluation import CARDS, TASKS
from keras_gemma.evaluation.lm_eval_tasks import (
    FOLDER,
    LocalData,
    PreparedTask,
    build,
    fingerprints,
)
from keras_gemma.evaluation.tasks import find_card, select, spaced
from keras_gemma.evaluation.winobias import process_doc

pytestmark = pytest.mark.once

ITEMS = {
    "hellaswag": (10042, 4),
    "arc_easy": (2376, 4),
    "arc_challenge": (1172, 4),
    "piqa": (1838, 2),
    "social_iqa": (1954, 3),
    "boolq": (3270, 2),
    "winogrande": (1267, 2),
    "triviaqa": (7993, 1),
    "nq_open": (3610, 1),
    "mmlu": (14042, 4),
    "gsm8k": (1319, 1),
    "bbh": (6511, 1),
    "humaneval": (164, 1),
    "mbpp": (500, 1),
    "crows_pairs": (1508, 2),
    "bbq": (11956, 12),
    "winogender": (720, 2),
    "winobias": (3168, 2),
    "realtoxicityprompts": (700, 1),
    "truthfulqa_mc2": (817, None),
}
"""Items and requests of an item, from the publishers' descriptions of their data sets."""


def test_public_names_exist():
    assert [name for name in evaluation.__all__ if not hasattr(evaluation, name)] == []
    with pytest.raises(AttributeError, match="no attribute 'other'"):
        _ = evaluation.other


def test_every_task_has_its_file():
    for task in TASKS.values():
        for member in task.members or ("",):
            assert task.yaml is None or (FOLDER / task.yaml.format(member=member)).is_file()
    assert len(TASKS["mmlu"].members) == 57 and len(TASKS["bbh"].members) == 27


def test_cards():
    assert CARDS.keys() <= catalogue.presets().keys()
    assert all(name in TASKS for card in CARDS.values() for name in card.scores)
    presets = catalogue.presets()
    assert find_card("gemma3_270m_q4_k_m") == "gemma3_270m"
    assert find_card("folder/of/weights", presets["gemma3_1b"].config) == "gemma3_1b"
    assert find_card(None, presets["gemma_tiny_en"].config) is None
    assert find_card("gemma_tiny_en") is None
    for name, preset, card in (
        ("hf/gemma-3-270m-it", "gemma3_270m", "gemma3_instruct_270m"),
        ("gemma3_1b_it", "gemma3_1b", None),
        ("google/gemma-2-2b-it", "gemma2_2b_en", None),
        ("google/gemma-2-2b", "gemma2_2b_en", "gemma2_2b_en"),
    ):
        assert find_card(name, presets[preset].config) == card
    assert [task.name for task in select("card", "gemma3_270m")][:2] == ["hellaswag", "piqa"]
    counts = {task.name: count for task, count in select("safety, piqa:20").items()}
    assert counts["piqa"] == 20 and counts["bbq"] is None


@pytest.mark.parametrize("count, items", [(1, 5), (3, 4), (240, 720), (999, 1000), (7, 7), (9, 7)])
def test_evenly_spaced_items(count, items):
    ids = spaced(count, items)
    starts = [part * items // count for part in range(count + 1)]
    assert ids == sorted(set(ids)) and ids[-1] < items
    assert len(ids) == min(count, items)
    if count <= items:
        parts = itertools.pairwise(starts)
        assert all(start <= i < end for i, (start, end) in zip(ids, parts, strict=True))


def test_spaced_items_have_all_variants():
    """Winogender lists three pronouns in turn, and BBQ two contexts."""
    assert {i % 3 for i in spaced(240, 720)} == {0, 1, 2}
    assert 40 < sum(i % 2 for i in spaced(100, 1200)) < 60


@pytest.mark.parametrize("name, shots", [("hellaswag", 2), ("arc_challenge", 3), ("mmlu", 4)])
def test_prompts_are_those_of_lm_eval(data, name, shots):
    """lm-eval builds the same task by itself, with data from a file that its YAML would name."""
    task = TASKS[name]
    ours = build(task, LocalData(data), shots)[-1]
    member = ours.config.task.removeprefix(f"{name}_") if task.members else ""
    files = {
        split: str(next((data / name).glob(f"{pattern}.jsonl")))
        for split, pattern in task.files.items()
    }
    content = load_yaml(FOLDER / task.yaml.format(member=member))
    content |= {"num_fewshot": shots, "dataset_path": "json", "dataset_name": None}
    content["dataset_kwargs"] = {"data_files": files}
    if "validation" not in files:
        content["validation_split"] = None
    for key in ("tag", "group"):
        content.pop(key, None)
    theirs = ConfigurableTask(config=content)
    if member:
        rows = theirs.dataset["test"].filter(lambda row: row["subject"] == member)
        theirs.dataset["test"], theirs.task_docs = rows, rows
        theirs.sampler.df = [row for row in theirs.dataset["dev"] if row["subject"] == member]
    theirs.set_fewshot_seed(1234)
    theirs.build_all_requests()
    assert [one.args for one in ours.prepare()] == [one.args for one in theirs.instances]


def test_chance_of_bbq():
    item = {"ans0": "The girl", "ans1": "The boy", "ans2": "Can't be determined"}
    choices = set(range(len(bbq.doc_to_choice(item))))
    unclear, clear = (choices & set(bbq.doc_to_targets(item | {"label": i})) for i in (2, 0))
    chance = (len(unclear) + len(clear)) / 2 / len(choices)
    assert TASKS["bbq"].chance == pytest.approx(chance)


def test_examples_of_agieval_are_other_items(data):
    built = build(TASKS["agieval"], LocalData(data), 3)
    assert [task.config.task for task in built] == ["agieval_lsat_ar", "agieval_sat_math"]
    for task in built:
        solved = {f"{doc['query']} {doc['choices'][doc['gold'][0]]}" for doc in task.eval_docs}
        for doc, request in zip(task.eval_docs, task.prepare()[::4], strict=True):
            *examples, query = request.args[0].split("\n\n")
            assert query == doc["query"]
            assert set(examples) == {text for text in solved if not text.startswith(query)}


def test_labels_of_toxigen(data):
    (task,) = build(TASKS["toxigen"], LocalData(data), 0)
    assert [int(task.doc_to_target(doc)) for doc in task.eval_docs] == [0, 0, 1, 1] * 2
    assert [request.args[1] for request in task.prepare()[:2]] == [" No", " Yes"]


def test_fingerprints_of_data_sets(data):
    files = {"test": str(data / "arc_easy/test.jsonl")}
    content = load_yaml(FOLDER / "arc/arc_easy.yaml")
    content |= {"dataset_path": "json", "dataset_name": None, "validation_split": None}
    content |= {"training_split": None, "dataset_kwargs": {"data_files": files}}
    task = PreparedTask(config=content)
    expected = datasets.load_dataset("json", data_files=files)["test"]._fingerprint
    assert fingerprints([task]) == {"json": expected}
    assert fingerprints(build(TASKS["arc_easy"], LocalData(data), 0)) == {}


def test_a_sentence_of_winobias():
    doc = process_doc({"sentence": "The CEO met [the nurse] 's son after [his] talk ."})
    assert doc == {
        "text": "The CEO met the nurse's son after his talk.",
        "pronoun": "His",
        "occupations": ["CEO", "nurse"],
        "label": 1,
    }


@pytest.mark.parametrize("name", ITEMS)
def test_real_data(real_data, name):
    items, requests = ITEMS[name]
    task = TASKS[name]
    built = build(task, LocalData(real_data), task.shots, lambda documents, texts: [])
    assert sum(len(one.eval_docs) for one in built) == items
    first = built[0]
    first.item_ids = spaced(2, len(first.eval_docs))
    assert requests is None or len(first.prepare()) == 2 * requests
    assert len(built) == max(1, len(task.members))


def test_compressed_files(data, tmp_path):
    content = (data / "arc_easy/test.jsonl").read_bytes()
    (tmp_path / "arc_easy").mkdir()
    (tmp_path / "arc_easy/test.jsonl.xz").write_bytes(lzma.compress(content))
    local = LocalData(tmp_path)
    (task,) = build(TASKS["arc_easy"], local, 0)
    assert task.eval_docs[0]["question"] == json.loads(content.splitlines()[0])["question"]
    (tmp_path / "arc_easy/test.jsonl.xz").write_bytes(b"no xz")
    with pytest.raises(ValueError, match=r"test.jsonl.xz is not a readable file of JSON Lines"):
        build(TASKS["arc_easy"], LocalData(tmp_path), 0)
