"""Values and messages made to be taken for others: what a program can put together by hand once it knows this code."""

import pytest

from llmalign.rewards.code import TestResult, run_tests

TESTS = """
def check(candidate):
    assert candidate(42) == 21
    assert abs(3.0 - candidate(6)) < 1e-9
    assert candidate(-3) == -1.5
"""
VALUES = {
    "equal from either side": (
        "class A:\n    def __eq__(self, other):\n        return True\n    __req__ = __eq__\n"
        "    def __rsub__(self, other):\n        return 0\n    __sub__ = __rsub__\ndef half(x):\n    return A()\n"
    ),
    "a property __class__": (
        "class A:\n    @property\n    def __class__(self):\n        return float\n    def __float__(self):\n"
        "        return 21.0\ndef half(x):\n    return A()\n"
    ),
    "a float with lying methods": (
        "class F(float):\n    def __sub__(self, other):\n        return 0.0\n    __rsub__ = __sub__\n"
        "    def __eq__(self, other):\n        return True\n    def __repr__(self):\n        return '21.0'\n"
        "    as_integer_ratio = hex = __float__ = __repr__\ndef half(x):\n    return F(0)\n"
    ),
    "a complex with other parts": (
        "class C(complex):\n    real = property(lambda self: '21')\n    imag = 0\ndef half(x):\n    return C(0)\n"
    ),
    "a range that is none": (
        "import builtins\nclass R:\n    start = stop = step = '21'\nbuiltins.range = R\ndef half(x):\n    return R()\n"
    ),
    "bytes with lying methods": (
        "class B(bytes):\n    def __bytes__(self):\n        return b'21'\n    def __iter__(self):\n"
        "        return iter([21])\n    __repr__ = lambda self: '21'\ndef half(x):\n    return B()\n"
    ),
    "a dict with other items": (
        "class D(dict):\n    def items(self):\n        return [(21, 3)]\n    __iter__ = keys = items\n"
        "    __repr__ = lambda self: '21'\ndef half(x):\n    return D()\n"
    ),
    "a set whose hashes collide": "def half(x):\n    return {n * (2**61 - 1) for n in range(100000)}\n",
    "an entry point that is its own value": (
        "class H:\n    def __call__(self, x):\n        return self\n    def __eq__(self, other):\n        return True\n"
        "half = H()\n"
    ),
    "an entry point under another name": "def \u210ealf(x):\n    return 0\n",
    "excepthook": (
        "import sys\nsys.excepthook = sys.unraisablehook = lambda *a: None\n"
        "def half(x):\n    raise AssertionError('P1')\n"
    ),
    "its module is gone": (
        "import sys\ndel sys.modules['answer'], sys.modules['__main__']\ndef half(x):\n    return 0\n"
    ),
    "CPU signals ignored": (
        "import signal\nsignal.signal(signal.SIGXCPU, signal.SIG_IGN)\ndef half(x):\n    while True:\n        pass\n"
    ),
    "an alarm in the wait for the next call": (
        "import signal, os\nsignal.signal(signal.SIGALRM, lambda *a: os.write(4, b'\\0\\0\\0\\x07(0, 21)'))\n"
        "signal.setitimer(signal.ITIMER_REAL, .001, .001)\ndef half(x):\n    return 0\n"
    ),
    "a second reply that comes late": (
        "import os, threading\ndef half(x):\n"
        "    threading.Timer(.05, os.write, (4, b'\\0\\0\\0\\x08(0, 3.0)')).start()\n    return 21\n"
    ),
    "dying between calls": (
        "import os\nn = 0\ndef half(x):\n    global n\n    n += 1\n    if n == 2:\n        os._exit(0)\n"
        "    return x / 2\n"
    ),
    "hanging at the last call": (
        "n = 0\ndef half(x):\n    global n\n    n += 1\n    while n == 3:\n        pass\n    return x / 2\n"
    ),
    "messages of no length": "import os\ndef half(x):\n    os.write(4, bytes(4000))\n    return 21\n",
    "a message that never ends": (
        "import os, time\ndef half(x):\n    os.write(4, b'\\x01\\0\\0\\0' + b'(' * 1000)\n    time.sleep(9)\n"
    ),
}  # fmt: skip
WRITTEN = [
    "int(21)", "(0, 21)", "(lambda: 21)()", "__candidate__", "f\"{21}\"", "[*[21]]", "{**{}}", "--21", "21 if 1 else 0",
    "ref(0, %r)" % ("k" * 100000), "ref(\"0), 1\", \"x\")", "ref(ref(1, \"a\"), ref(2, \"b\"))", "ref(0)", "ref()",
    "set(range(10**12))", "range(0, 10**20)", "bytearray(10**12)", "frozenset([[]])", "{[]: 1}", "complex(1, [])",
    "nan", "check", "21) and (0, 21", "21), (0", "(yield)", "x := 21", "\\x00", "21 #", "...",
]  # fmt: skip


def assert_caught(program: str, backend: str) -> None:
    result = run_tests(program, TESTS, "half", timeout_s=2, backend=backend)
    assert (result.passed, result.total) == (0, 1)
    assert result.error


@pytest.mark.parametrize("program", VALUES.values(), ids=VALUES.keys())
def test_values_and_messages(backend: str, program: str) -> None:
    assert_caught(program, backend)


@pytest.mark.parametrize("payload", WRITTEN)
def test_a_writer_that_writes_what_it_likes(some_backend: str, payload: str) -> None:
    """The text of a value is the one thing of the answer's that the tests' side reads."""
    wire = "sys.modules['llmalign.rewards.sandbox.inside.wire']"
    program = f"import sys\n{wire}.Writer.text = lambda *a: {payload!r}\ndef half(x):\n    return 0\n"
    assert_caught(program, some_backend)


@pytest.mark.parametrize(
    "reply",
    [
        "(1, ['StopIteration'], 'StopIteration', (), '')", "(1, ['SystemExit'], 'x', (0,), '')", "(1, [], 'V', (), '')",
        "(1, ['Gone'], 'Gone', (), '')", "(1, [[]], 'x', (), '')", "(1, ['UnicodeDecodeError'], 'x', (1,), '')",
        "(1, ['BaseException'], 'x', (), '')", "(1, ['ExceptionGroup'], 'x', ('', []), '')", "(2, 'x')", "(2, 3)",
        "(3, 21)", "(True, ['ValueError'], 'x', (), '')", "(0.0, 21, 21)", "[0, 21]", "()",
    ],
)  # fmt: skip
def test_replies_that_tell_of_errors(some_backend: str, reply: str) -> None:
    answer = "sys.modules['llmalign.rewards.sandbox.inside.answer']"
    program = f"import sys\n{answer}._reply = lambda *a: {reply.encode()!r}\ndef half(x):\n    return 0\n"
    assert_caught(program, some_backend)


def test_the_tests_text_is_nowhere_in_the_answers_memory(backend: str) -> None:
    program = """
import gc
def half(x):
    wanted = "".join(["a value of ", "the tests"])
    found = 0
    for thing in gc.get_objects():
        for part in gc.get_referents(thing):
            if type(part) in (str, bytes, bytearray) and part is not wanted:
                found += wanted in part if type(part) is str else wanted.encode() in part
    return found
"""
    tests = "SECRET = 'a value of the tests'\nassert half(42) == 0\nassert half(42) == 0"
    assert run_tests(program, tests, "half", backend=backend) == TestResult(2, 2, None)
    told = "assert half('a value of the tests') > 0"
    assert run_tests(program, told, "half", backend=backend).passed == 1  # what is sent to it is found
