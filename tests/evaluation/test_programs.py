"""Programs made by a model: fences, verdicts that cannot be forged, and pass@k."""

import itertools
import json
import lzma
import os
import re
import sys
import threading
import time
from pathlib import Path

import pytest

from keras_gemma.evaluation import programs
from keras_gemma.evaluation.programs import (
    check_humaneval,
    check_mbpp,
    describe_fences,
    missing_fences,
    pass_at_k,
    run_all,
    run_program,
)

pytestmark = pytest.mark.once

TEST = "assert f(1) == 2"

needs_fences = pytest.mark.skipif(bool(missing_fences()), reason=describe_fences())


def insert_in_children(monkeypatch, code: str) -> None:
    """Runs `code` in each child process before its job."""
    head, _, call = programs.CHILD.partition("from program_child")
    monkeypatch.setattr(programs, "CHILD", f"{head}\n{code}from program_child{call}")


def body(*lines: str) -> str:
    return "\n  ".join(["import os, sys, socket\ndef f(x):", *lines])


@needs_fences
def test_right_and_wrong_programs():
    right = run_program(body("return x + 1"), TEST)
    assert right.passed and right.reason == "" and 0 < right.seconds < 5
    assert run_program(body("return x"), TEST).reason == "failed: assert f(1) == 2"
    assert "SyntaxError" in run_program("def f(x:", TEST).reason
    assert run_program("g = 1", TEST).reason == "KeyError: 'f'"
    assert run_program(body("return y"), TEST).reason == "NameError: name 'y' is not defined"


FORGERIES = {
    "exits": body("os._exit(0)"),
    "exits as if unfenced": body("os._exit(125)"),
    "exits as a module": "import os\nos._exit(0)",
    "sys.exit": body("sys.exit(0)"),
    "prints a verdict": "print('passed')\n" + body("print('', file=sys.stderr)", "return 3"),
    "equals everything": "class E(int):\n  __eq__ = lambda *_: True\n" + body("return E(7)"),
    "any object": "class E:\n  __eq__ = lambda *_: True\n" + body("return E()"),
    "changes builtins": (
        "import builtins\nbuiltins.AssertionError = builtins.ValueError = None\n"
        "import json\njson.loads = json.dumps = lambda *_: 'true'\n" + body("return 3")
    ),
    "changes callers": body(
        "frame = sys._getframe()",
        "while frame := frame.f_back:",
        "  frame.f_globals['f'] = frame.f_globals['FAILED'] = 0",
        "return 3",
    ),
    "writes answers": (
        "import os\nfor i in range(64):\n  try: os.write(i, b'{\"value\": null}\\n' * 9)\n"
        "  except OSError: pass\n" + body("return 3")
    ),
    "writes an empty error": (
        'import os\nfor i in range(64):\n  try: os.write(i, b\'{"error": ""}\\n\' * 9)\n'
        "  except OSError: pass\n" + body("return 3")
    ),
    "stops an iteration": body("raise StopIteration"),
    "kills its group": body("os.kill(0, 9)", "os.kill(-1, 9)", "return 3"),
    "crashes": body("import ctypes", "ctypes.string_at(0)"),
}


@needs_fences
@pytest.mark.parametrize("name", FORGERIES)
def test_forged_verdicts_fail(name):
    assert not run_program(FORGERIES[name], f"{TEST}\nassert list(map(f, [1])) == [2]").passed


@needs_fences
def test_expected_values_are_not_in_the_process():
    search = body(
        "import gc",
        "texts = [o for o in gc.get_objects() if isinstance(o, dict)]",
        "return 'unique' + 'value' in str(texts)",
    )
    assert run_program(search, "assert f(1) is False  # uniquevalue").passed


INTRUSIONS = {
    "reads the password file": ("open('/etc/passwd')", "No such file"),
    "reads the home directory": (f"os.listdir({str(Path(__file__).parent)!r})", "No such file"),
    "writes outside": ("open('/etc/new', 'w')", "Permission denied"),
    "writes a library": (f"open({os.__file__!r}, 'a')", "Permission denied|Read-only"),
    "executes a file of its own": (
        "open('a', 'w').close(); os.chmod('a', 0o755); os.execv('a', ['a'])",
        "Permission denied",
    ),
    "sees processes": ("os.listdir('/proc')", "No such file"),
    "connects": ("socket.socket().connect(('127.0.0.1', 22))", "Permission denied|unreachable"),
    "sends": (
        "socket.socket(type=socket.SOCK_DGRAM).sendto(b'x', ('1.1.1.1', 53))",
        "unreachable",
    ),
    "starts a program": ("os.execv('/bin/sh', ['sh'])", "No such file"),
    "reads the environment": ("os.environ['PATH']", "KeyError"),
    "reads standard input": ("input()", "EOFError"),
    "takes memory": ("bytearray(3 << 30)", "MemoryError"),
    "writes a large file": ("open('a', 'wb').write(bytes(2 << 20))", "File too large"),
    "writes many files": (
        "[open(f'{i}', 'wb').write(bytes(1 << 20)) for i in range(50)]",
        "No space left",
    ),
    "becomes root": ("os.setuid(0)", "not permitted|Invalid argument"),
    "lifts a limit": ("import resource; resource.setrlimit(resource.RLIMIT_AS, (-1, -1))", "limit"),
}


@needs_fences
@pytest.mark.parametrize("name", INTRUSIONS)
def test_intrusions_are_refused(name):
    statement, reason = INTRUSIONS[name]
    result = run_program(body(statement, "return 2"), TEST)
    assert not result.passed
    assert re.search(reason, result.reason)


@needs_fences
def test_libraries_cannot_be_changed(monkeypatch, tmp_path):
    """Neither Python's nor one in `/tmp` that belongs to the program's user."""
    library = tmp_path / "library.py"
    library.write_text("pass")
    os.utime(library, (1, 1))
    if os.geteuid() == 0:
        os.chown(tmp_path, 65534, 65534)
        os.chown(library, 65534, 65534)
    code = f"import fences\nfences.LIBRARIES += ({str(tmp_path)!r},)\n"
    insert_in_children(monkeypatch, code)
    program = (
        "import os\ndef f(path):\n  folder, errors = os.path.dirname(path), []\n"
        "  for change in (lambda: os.chmod(path, 0), lambda: os.chmod(folder, 0),\n"
        "      lambda: os.utime(path), lambda: os.truncate(path, 0), lambda: open(path, 'a'),\n"
        "      lambda: os.chown(path, -1, -1), lambda: open(folder + '/new', 'w'),\n"
        "      lambda: os.unlink(path)):\n"
        "    try: errors.append(change())\n"
        "    except OSError as error: errors.append(error.errno)\n"
        "  return errors"
    )
    before = library.stat(), tmp_path.stat()
    test = f"for path in {[str(library), os.__file__]}:\n  errors = f(path)\n"
    test += "  assert set(errors) <= {13, 30} and errors.count(30) >= 5, errors"
    result = run_program(program, test, ["f"])
    assert result.passed, result.reason
    assert (library.stat(), tmp_path.stat()) == before


@needs_fences
def test_mounts_cannot_be_changed():
    """Not even by root of a user namespace of the program's own.

    Landlock forbids it. If the tests run as root, a program gets no user namespace at all.
    """
    program = body(
        "import ctypes",
        "libc = ctypes.CDLL(None, use_errno=True)",
        "libc.unshare(0x10020000)",
        "writable = (ctypes.c_uint64 * 4)(0, 1)",
        "results = [",
        "  libc.mount(b'x', b'/tmp', b'tmpfs', 0, None), libc.umount2(b'/', 2),",
        "  libc.syscall(442, -100, x, 0x8000, writable, ctypes.c_size_t(32))]",
        "return results, ctypes.get_errno()",
    )
    mount = sys.base_prefix + "/lib"
    test = f"assert f({mount.encode()}) == ([-1, -1, -1], 1), f({mount.encode()})"
    assert run_program(program, test).reason == ""


@needs_fences
def test_the_working_directory_is_writable_and_empty():
    program = body("open('a', 'w').write('2')", "return os.listdir(), int(open('a').read())")
    assert run_program(program, "assert f(1) == (['a'], 2)").passed


@needs_fences
def test_no_process_survives(monkeypatch, tmp_path):
    """A loop ends at the time limit, a fork bomb is small, and a new session does not help."""
    mark = f"#{tmp_path}"
    monkeypatch.setattr(programs, "CHILD", programs.CHILD + mark)
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    bomb = body(
        "n = 0",
        "try:",
        "  while n < 100:",
        "    if os.fork() == 0: os.setsid(); import time; time.sleep(60)",
        "    n += 1",
        "except OSError: return n",
    )
    assert run_program(bomb, "assert 0 < f(1) < 8").passed
    result = run_program(body("while True: pass"), TEST, seconds=0.5)
    assert result.reason == "timed out after 0.5 s" and result.seconds < 3
    assert "timed out" in run_program("while True: pass", TEST, seconds=0.5).reason
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline")]
    assert not any(mark.encode() in line for line in lines)
    assert list(tmp_path.iterdir()) == []


@needs_fences
def test_values_travel():
    values = [
        None, True, 7, 0.1, float("inf"), 1 + 2j, "\ud800\u00e9\n", b"\x00", (), (1, [2]),
        {3}, frozenset({4}), {(1, 2): {"a": None}},
    ]  # fmt: skip
    test = f"inf = float('inf')\nfor x in {values!r}:\n  y = f(x)\n  assert x == y, (x, y)\n"
    test += "  assert type(x) is type(y)"
    assert run_program("def f(x): return x", test, ["f"]).passed
    test = "assert f(10**5000) == 10**5000 and [*map(type, map(f, (True, 1)))] == [bool, int]"
    assert run_program("def f(x): return x", test, ["f"]).passed


@needs_fences
def test_objects_stay_in_the_process():
    program = "class Node:\n  def __init__(s, v): s.v, s.next = v, None\n"
    program += "def total(n): return n.v + (total(n.next) if n.next else 0)\n"
    program += "def count(n): yield from range(n)"
    test = "a = Node(1)\na.next = Node(2)\nassert total(a) == 3 and a.next.v == 2\n"
    assert run_program(program, test + "assert list(count(3)) == [0, 1, 2]").passed
    assert "not plain data" in run_program(program, "assert Node(1)").reason
    assert "type function" in run_program(program, "total(lambda: 1)").reason


ITEM = {
    "prompt": "def half(x):\n    return x / 2\n\ndef f(x):\n    '''Adds one.'''\n",
    "test": "def check(candidate):\n    assert half(candidate(1)) == 1",
    "entry_point": "f",
}


@needs_fences
def test_humaneval():
    assert check_humaneval(ITEM, "    return x + 1\n\nprint(f(f))").passed
    assert check_humaneval(ITEM, "    return x + 1\n```\nThis adds one.").passed
    assert not check_humaneval(ITEM, "    return x").passed
    # The test's helper is the prompt's.
    assert not check_humaneval(ITEM, "    return x\n\nhalf = lambda x: 1").passed


def test_free_names():
    test = "import math as m\nfrom a import b\ndef g(x, *, y=z): return x + y\n"
    test += "try: assert f(k=[i for i in w]) == len(v)\nexcept E as e: e\nclass C: pass\nC"
    assert programs.free_names(test) == ["E", "f", "v", "w", "z"]


def test_run_all_uses_the_processors_of_the_process(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)

    def check(doc, completion):
        time.sleep(0.01)
        return threading.get_ident()

    assert len({*run_all(check, [{}] * 4, [""] * 4)}) == 1


def test_cut():
    assert programs.cut("a\nprint b\ndef c", programs.HUMANEVAL_STOPS) == "a"
    assert programs.cut("a", programs.HUMANEVAL_STOPS) == "a"


@needs_fences
def test_mbpp():
    doc = {
        "code": "import math\r\ndef sum(a, b):\r\n  return a + b",
        "test_list": ["assert math.isclose(sum(1, 2), 3)", "assert set([sum(1, 1)]) == {2}"],
        "test_setup_code": "",
    }
    right = "def sum(a, b):\n  return b + a\n"
    hostile = "def sum(a, b):\n  return 1\nclass math: isclose = set = lambda *_: True\nset = len"
    completions = [right, f"{right}[DONE]\n(", f"```python\n{right}```\nA sum.", hostile, ""]
    results = run_all(check_mbpp, [doc] * 5, completions, workers=2)
    assert [result.passed for result in results] == [True, True, True, False, False]


def test_pass_at_k():
    for n, k in itertools.product(range(1, 7), range(1, 7)):
        if k > n:
            continue
        for c in range(n + 1):
            choices = list(itertools.combinations(range(n), k))
            share = sum(min(choice) < c for choice in choices) / len(choices)
            assert pass_at_k(n, c, k) == pytest.approx(share)
    assert pass_at_k(10_000, 9, 1) == pytest.approx(9 / 10_000)
    with pytest.raises(ValueError, match="`k` must be an integer from 1 to 3"):
        pass_at_k(3, 1, 4)


@pytest.fixture
def few_fences(monkeypatch):
    """A kernel that refuses namespaces and Landlock."""
    refuse = (
        "import fences\n"
        "old = fences.call\n"
        "def call(name, *rest):\n"
        "  if name in ('unshare', 'syscall'): raise OSError(1, name + ' refused')\n"
        "  return old(name, *rest)\n"
        "fences.call = call\n"
    )
    insert_in_children(monkeypatch, refuse)
    missing_fences.cache_clear()
    yield
    missing_fences.cache_clear()


def test_refuses_without_fences(few_fences):
    assert missing_fences().keys() >= {"namespaces", "landlock"}
    with pytest.raises(ValueError, match=r"run_programs='unsafe'.*unshare refused") as error:
        run_program(body("return 2"), TEST)
    assert "landlock: syscall refused" in str(error.value)
    assert "namespaces no (unshare refused)" in describe_fences()


@needs_fences
@pytest.mark.parametrize("role", ["program", "test"])
def test_refuses_if_one_child_lacks_a_fence(monkeypatch, role):
    code = (
        "import program_child\n"
        "old = program_child.first_process\n"
        "def first_process(job, missing, inside):\n"
        f"  return old(job, {{'limits': 'none'}} if job['role'] == {role!r} else missing, inside)\n"
        "program_child.first_process = first_process\n"
    )
    insert_in_children(monkeypatch, code)
    with pytest.raises(ValueError, match="does not hold: limits: none"):
        run_program(body("return 2"), TEST)


@needs_fences
def test_read_only_mounts_are_part_of_the_fence(monkeypatch):
    """A kernel without `mount_setattr`."""
    code = (
        "import fences\n"
        "def refuse(mount): raise OSError(38, 'Function not implemented')\n"
        "fences.make_read_only = refuse\n"
    )
    insert_in_children(monkeypatch, code)
    missing = missing_fences.__wrapped__()
    assert missing["namespaces"] == "Function not implemented"


def test_unsafe_runs_with_the_fences_that_hold(few_fences):
    assert run_program(body("return 2"), TEST, unsafe=True).passed
    assert not run_program(body("os._exit(0)"), TEST, unsafe=True).passed
    assert "MemoryError" in run_program(body("bytearray(3 << 30)"), TEST, unsafe=True).reason
    loop = run_program(body("os.fork()", "while True: pass"), TEST, seconds=0.5, unsafe=True)
    assert "timed out" in loop.reason


@needs_fences
@pytest.mark.skipif("KERAS_GEMMA_BENCHMARKS" not in os.environ, reason="needs the data sets")
@pytest.mark.parametrize(
    ("name", "check", "key"),
    [("humaneval", check_humaneval, "canonical_solution"), ("mbpp", check_mbpp, "code")],
)
def test_published_solutions_pass(name, check, key):
    with lzma.open(Path(os.environ["KERAS_GEMMA_BENCHMARKS"]) / name / "test.jsonl.xz") as file:
        docs = [json.loads(line) for line in file][::20]
    results = run_all(check, docs, [doc[key] for doc in docs])
    assert [doc for doc, result in zip(docs, results, strict=True) if not result.passed] == []
