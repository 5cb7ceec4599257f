"""Programs that a model wrote: right if they pass the tests, without harm to what runs them whatever they do."""

import contextlib
import os
import socket
import time
from pathlib import Path

import pytest

from pshare_jax.evaluation import programs
from pshare_jax.evaluation.programs import CodeVerifier, isolates, programs_of

pytestmark = pytest.mark.host

HUMAN_EVAL = {
    "prompt": 'import math\n\n\ndef area(radius: float) -> float:\n    """The area of a circle.\n    """\n',
    "entry_point": "area",
    "test": "def check(candidate):\n    assert abs(candidate(2.0) - 12.566370614) < 1e-6\n",
    "answer": "",
}
BODY = "    return math.pi * radius**2\n"
WHOLE = f"def area(radius):\n{BODY}"
verify = CodeVerifier(cpu_seconds=2)


@pytest.mark.parametrize(
    ("answer", "score"),
    [
        (BODY, 1),
        (BODY.strip(), 1),
        (f"square = radius**2\n{BODY.replace('radius**2', 'square')}".strip(), 1),
        (WHOLE, 1),
        (f"Sure:\n```python\n{WHOLE}```\nThis multiplies.", 1),
        (f"```\n{WHOLE}", 1),
        ("    return radius", 0),
        ("    return math.pi *", 0),
        ("It is pi r squared.", 0),
        ("", 0),
    ],
)
def test_an_answer_continues_the_prompt_or_stands_for_itself(answer, score):
    assert verify(answer, HUMAN_EVAL) == score


def test_tests_may_be_a_list_of_statements():
    """As in MBPP, whose prompt is no program."""
    record = {"prompt": "Add two numbers.", "test": ["assert add(1, 2) == 3", "assert add(0, 0) == 0"]}
    assert verify("def add(a, b):\n    return a + b", record) == 1
    assert verify("def add(a, b):\n    return a - b", record) == 0
    assert programs_of("x = 1", {"answer": "x = 1"}) == []


WRONG = {
    "ends early": "import os; os._exit(0)",
    "exits": "exit(0)",
    "computes for ever": "while True: pass",
    "catches everything for ever": "while True:\n    try:\n        while True: pass\n    except BaseException: pass",
    "takes all memory": "x = bytearray(64 << 30)",
    "fills the disk": "open('f', 'wb').write(bytes(64 << 20))",
    "opens many files": "files = [open(str(i), 'w') for i in range(1000)]",
    "reads its input": "input()",
    "kills": "import os; os.kill(os.getppid(), 9)",
    "removes": "import shutil; shutil.rmtree('.')",
    "starts a process": "import subprocess; subprocess.run(['true'])",
    "is no program": "def f(:",
    "recurses": "def f(): f()\nf()",
    "dies": "import ctypes; ctypes.string_at(0)",
}


@pytest.mark.parametrize("program", WRONG.values(), ids=list(WRONG))
def test_programs_that_fail(program):
    assert not verify.passes(program)


RIGHT = {
    "nothing": "",
    "prints": "print('x' * 1_000_000)",
    "uses numpy": "import numpy as np\nassert np.arange(5).sum() == 10",
    "writes a file": "open('f', 'w').write('x')\nassert open('f').read() == 'x'",
    "leaves a thread": "import threading, time\nthreading.Thread(target=time.sleep, args=(100,)).start()",
    "is no main module": "assert __name__ != '__main__'",
}


@pytest.mark.parametrize("program", RIGHT.values(), ids=list(RIGHT))
def test_programs_that_pass(program):
    assert verify.passes(program)


def test_no_variable_of_the_environment_is_seen(monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    assert verify.passes("import os\nassert 'HF_TOKEN' not in os.environ")


STARTS_ANOTHER = """
import multiprocessing.util, time
open("f", "w").write("x")
multiprocessing.util.spawnv_passfds(b"/bin/sh", [b"sh", b"-c", b"sleep 123.25; true"], [])
time.sleep(100)
"""


def sleepers() -> list[Path]:
    """The processes that STARTS_ANOTHER has started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [path] if b"123.25" in path.read_bytes() else []
    return found


@pytest.mark.skipif(not Path("/proc/self/cmdline").exists(), reason="needs /proc")
@pytest.mark.parametrize("isolated", [True, False])
def test_a_program_that_waits_ends_with_all_that_it_started(isolated, tmp_path, monkeypatch):
    if isolated and not isolates():
        pytest.skip("this system gives no namespaces")
    monkeypatch.setattr(programs.tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(programs, "SPARE_SECONDS", 1)
    monkeypatch.setattr(programs, "isolates", lambda: isolated)
    assert not CodeVerifier(cpu_seconds=1).passes(STARTS_ANOTHER)
    assert not list(tmp_path.iterdir())
    # The kernel ends killed processes in its own time.
    deadline = time.monotonic() + 60
    while sleepers():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.skipif(not isolates(), reason="this system gives no namespaces")
def test_there_is_no_network(monkeypatch):
    """Not even that of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        reach = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        assert not verify.passes(reach)
        monkeypatch.setattr(programs, "isolates", lambda: False)
        assert verify.passes(reach), "the test's own premise"


def test_without_namespaces_the_limits_hold(monkeypatch):
    monkeypatch.setattr(programs, "isolates", lambda: False)
    assert verify("    return math.pi * radius**2\n", HUMAN_EVAL) == 1
    for name in ("ends early", "computes for ever", "takes all memory", "starts a process"):
        assert not verify.passes(WRONG[name])


def test_this_process_is_not_changed():
    before = dict(os.environ), Path.cwd()
    assert not verify.passes("import os; os.chdir('/'); os.environ['A'] = 'b'; assert False")
    assert (dict(os.environ), Path.cwd()) == before
