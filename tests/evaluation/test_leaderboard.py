"""The leaderboard: statistics against brute force, tables, the plot, and damaged folders."""

import dataclasses
import json
import math
import random
import re
import shutil
import statistics
import sys

import pytest

from keras_gemma.cli import main
from keras_gemma.evaluation import compare, evaluate
from keras_gemma.evaluation.results import Results, TaskResult, write_file
from tests.evaluation.conftest import FakeLM

pytestmark = pytest.mark.once

TASKS = ("arc_easy", "boolq")
METRICS = {
    "arc_easy": ("acc", 0.25, 0.577),
    "boolq": ("acc", 0.5, None),
    "crows_pairs": ("pct_stereotype", 0.5, None),
    "gsm8k": ("exact_match", 0.0, None),
}
"""Metric, chance and published score of each task."""


@pytest.fixture(autouse=True)
def restored_hook(monkeypatch):
    """The command replaces the hook for exceptions."""
    monkeypatch.setattr("sys.excepthook", sys.excepthook)


def write(folder, name, values, **changes):
    """Writes a folder as `evaluate` does. `values` has a value per document for each task."""
    results = Results({"name": name, "dtype": "float32", "backend": "jax"}, {})
    for task, items in values.items():
        metric, chance, published = METRICS[task]
        scores = list(items.values())
        fields = {field.name: None for field in dataclasses.fields(TaskResult)} | {
            "task": task,
            "metric": metric,
            "score": statistics.mean(scores),
            "stderr": statistics.stdev(scores) / len(scores) ** 0.5,
            "chance": chance,
            "published": published,
            "shots": 0,
            "items": len(scores),
            "of_items": 99,
            "protocol": {"shots": 0, "samples": len(scores)},
        }
        results[task] = TaskResult(**fields | changes)
        lines = [
            {"doc_id": i, "doc_hash": f"{task}{i}", "filter": "none", metric: value}
            for i, value in items.items()
        ]
        write_log(folder, task, lines)
    write_file(folder / "summary.json", json.dumps(results.to_dict()))
    return folder


def write_log(folder, task, lines, name=None):
    path = folder / task / f"samples_{name or task}_2026-11-29T10-00-00.000001.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def answers(seed, share, ids=range(40)):
    rng = random.Random(seed)
    return {i: float(rng.random() < share) for i in ids}


@pytest.fixture
def folders(tmp_path):
    first = {"arc_easy": answers(0, 0.6), "boolq": answers(1, 0.7)}
    second = {
        "boolq": answers(2, 0.8),
        "arc_easy": answers(3, 0.8, range(10, 60)),
    }
    return [write(tmp_path / "a", "a", first), write(tmp_path / "b", "b", second)]


def samples(folder, task):
    (path,) = (folder / task).iterdir()
    lines = path.read_text().splitlines()
    return {item["doc_id"]: item["acc"] for item in map(json.loads, lines)}


def test_statistics(folders):
    stats = pytest.importorskip("scipy.stats")
    board = compare(folders)
    assert board.tasks == ("arc_easy", "boolq")
    first, second = board.rows
    assert first.difference is None
    a, b = ([samples(folder, task) for task in board.tasks] for folder in folders)
    differences = [[y[i] - x[i] for i in x if i in y] for x, y in zip(a, b, strict=True)]
    assert second.difference.count == 30 + 40
    assert second.difference.mean == pytest.approx(
        statistics.mean(map(statistics.mean, differences))
    )
    for task, values, x, y in zip(board.tasks, differences, a, b, strict=True):
        estimate = second.differences[task]
        assert estimate.count == len(values)
        shared = [i for i in x if i in y]
        paired = stats.ttest_rel([y[i] for i in shared], [x[i] for i in shared])
        assert estimate.mean / estimate.stderr == pytest.approx(paired.statistic)
    errors = [second.differences[task].stderr for task in board.tasks]
    assert second.difference.stderr == pytest.approx(math.hypot(*errors) / 2)
    means = [statistics.mean(values.values()) for values in a]
    assert first.mean.mean == pytest.approx(statistics.mean(means))
    above = [(means[0] - 0.25) / 0.75, (means[1] - 0.5) / 0.5]
    assert first.above_chance.mean == pytest.approx(statistics.mean(above))


def test_errors_of_means_by_resampling(folders):
    """The closed form is near the spread over resampled items."""
    row = compare(folders).rows[1]
    a, b = ([samples(folder, task) for task in TASKS] for folder in folders)
    pairs = [[y[i] - x[i] for i in x if i in y] for x, y in zip(a, b, strict=True)]
    rng = random.Random(0)
    draws = [
        statistics.mean(statistics.mean(rng.choices(values, k=len(values))) for values in pairs)
        for _ in range(2000)
    ]
    assert row.difference.stderr == pytest.approx(statistics.stdev(draws), rel=0.1)
    absolute = [list(values.values()) for values in b]
    draws = [
        statistics.mean(
            (statistics.mean(rng.choices(values, k=len(values))) - chance) / (1 - chance)
            for values, chance in zip(absolute, (0.25, 0.5), strict=True)
        )
        for _ in range(2000)
    ]
    assert row.above_chance.stderr == pytest.approx(statistics.stdev(draws), rel=0.1)


def test_best_reference(folders):
    board = compare(folders, reference="best")
    assert board.reference.name == "b"
    assert board.rows[0].difference.mean == pytest.approx(-compare(folders).rows[1].difference.mean)


def test_command(folders, tmp_path, capsys):
    paths = [str(folder) for folder in folders]
    plot = tmp_path / "scores.png"
    assert main(["leaderboard", *paths, "--plot", str(plot)]) == 0
    table = capsys.readouterr().out
    assert "reference" in table and "float32" in table and "57.7" in table
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert main(["leaderboard", *paths, "--json"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [row["name"] for row in rows] == ["a", "b"]
    assert rows[1]["difference"]["count"] == 70
    assert main(["leaderboard", *paths, "--markdown"]) == 0
    lines = capsys.readouterr().out.split("\n\n")[0].splitlines()
    assert {line.count("|") for line in lines} == {8}


def test_figure(folders):
    figure = compare(folders).figure()
    axes = figure.axes[0]
    heights = [bar.get_height() for bars in axes.containers if hasattr(bars, "patches")
               for bar in bars.patches]  # fmt: skip
    scores = [100 * row.entry.tasks[task].score for row in compare(folders).rows for task in TASKS]
    assert heights == pytest.approx(scores)
    assert {"chance", "published", "a", "b"} == {t.get_text() for t in figure.legends[0].texts}


def test_one_folder_has_no_differences(folders):
    (row,) = compare(folders[:1]).rows
    assert row.difference is None and row.mean.count == 80


def test_equal_names_show_the_folder(folders, tmp_path):
    other = write(tmp_path / "c", "a", {"boolq": answers(5, 0.5)})
    board = compare([folders[0], other])
    assert [row.entry.name for row in board.rows] == ["a (a)", "a (c)"]
    assert board.tasks == ("boolq",)
    other = write(tmp_path / "d" / "a", "a", {"boolq": answers(5, 0.5)})
    names = [row.entry.name for row in compare([folders[0], other]).rows]
    assert names == [f"a ({folders[0]})", f"a ({other})"]


def test_groups_and_filters(tmp_path):
    """Items of a group have their own task; only the filter of the score counts."""
    paths = [write(tmp_path / x, x, {"gsm8k": {0: 0, 1: 1}}) for x in ("a", "b")]
    for path, value in zip(paths, (0, 1), strict=True):
        shutil.rmtree(path / "gsm8k")
        for name in ("x", "y_z"):
            lines = [
                {"doc_id": 0, "filter": filter, "exact_match": value * (filter == "strict-match")}
                for filter in ("flexible-extract", "strict-match")
            ]
            write_log(path, "gsm8k", lines, name)
    difference = compare(paths).rows[1].difference
    assert (difference.mean, difference.count) == (1, 2)


def test_means_leave_out_metrics_without_a_better_direction(folders, tmp_path):
    values = {"crows_pairs": answers(0, 0.6), "boolq": answers(1, 0.7)}
    board = compare([write(tmp_path / x, x, values) for x in ("c", "d")])
    assert board.tasks == ("crows_pairs", "boolq")
    assert board.rows[0].mean.mean == statistics.mean(values["boolq"].values())
    assert board.rows[1].difference.count == 40


def test_unknown_errors_are_left_out(tmp_path):
    folder = write(tmp_path / "a", "a", {"boolq": answers(0, 0.5)}, stderr=None)
    board = compare([folder])
    assert "±" not in board.to_markdown()
    assert board.as_dicts()[0]["mean"]["stderr"] is None


@pytest.mark.parametrize("name", ["shots", "chat", "data"])
def test_models_with_another_protocol(tmp_path, name):
    protocols = {"a": {"samples": 5, name: 0}, "b": {"samples": 9, name: 10}}
    paths = [
        write(tmp_path / x, x, {"boolq": answers(0, 0.5)}, protocol=protocol)
        for x, protocol in protocols.items()
    ]
    message = f"same {name} for boolq.*{paths[0]} and {paths[1]} with {name}=0 and 10"
    with pytest.raises(ValueError, match=message):
        compare(paths)


def test_both_tables_escape_bars(tmp_path):
    folder = write(tmp_path / "a", "a|b", {"boolq": answers(0, 0.5)}, title="c|d", shots=0)
    assert r"a\|b" in compare([folder]).to_markdown()
    assert r"c\|d" in Results.load(folder).markdown()


def damage(folder, case):
    (samples,) = (folder / "boolq").iterdir()
    summary = folder / "summary.json"
    if case == "no summary":
        summary.unlink()
    elif case == "damaged summary":
        summary.write_text('{"name": "b", "tasks": {')
    elif case == "no score":
        summary.write_text('{"model": {}, "versions": {}, "tasks": {"boolq": {"metric": "acc"}}}')
    elif case == "no samples":
        samples.unlink()
    elif case == "damaged samples":
        samples.write_text(samples.read_text()[:-20])
    elif case == "no common task":
        summary.write_text(summary.read_text().replace("boolq", "x").replace("arc_easy", "y"))
    elif case == "other documents":
        samples.write_text(samples.read_text().replace("boolq0", "boolq9"))
    elif case == "other items":
        samples.write_text(samples.read_text().replace('"doc_id": ', '"doc_id": 9'))
    elif case == "other metric":
        summary.write_text(summary.read_text().replace('"acc"', '"acc_norm"'))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("no summary", "DIR must be folders that `evaluate` wrote.*b, which has no summary.json"),
        ("damaged summary", "b/summary.json is damaged"),
        ("no score", "b/summary.json is damaged.*missing"),
        ("no samples", "b/boolq has no log of items"),
        ("damaged samples", "b/boolq/samples_.*, line 40: expected an object"),
        ("no common task", "DIR must have at least one common task. Received: .*a: arc_easy, bool"),
        ("other documents", "different items for boolq in .*a and .*b"),
        ("other items", "different items for boolq in .*a and .*b"),
        ("other metric", "the same metric for arc_easy.*acc, acc_norm"),
    ],
)
def test_bad_folders(folders, case, message, capfd):
    damage(folders[1], case)
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        main(["leaderboard", *map(str, folders)])

    sys.excepthook(error.type, error.value, None)
    assert re.search(message, capfd.readouterr().err)


def test_folders_of_evaluations(data, tmp_path):
    """Folders that `evaluate` wrote, with a group and a filter."""
    names = {"a": "arc_easy,mmlu:8,triviaqa", "b": "mmlu,arc_easy:6,triviaqa"}
    for folder, tasks in names.items():
        evaluate(FakeLM(), tasks, data=data, shots=0, output=tmp_path / folder, name=folder)
    first, second = compare([tmp_path / folder for folder in names]).rows
    assert {task: e.count for task, e in second.differences.items()} == {
        "arc_easy": 6,
        "mmlu": 8,
        "triviaqa": 8,
    }
    assert (second.difference.mean, second.difference.stderr) == (0, 0)
    results = Results.load(tmp_path / "a")
    assert first.mean.mean == statistics.mean(result.score for result in results.values())
