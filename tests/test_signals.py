"""Both signals are answered inside, and as before after it."""

from __future__ import annotations

import signal
import subprocess
import sys

from luthier.signals import answered

BOTH = (signal.SIGINT, signal.SIGTERM)

# A program around Python answers SIGTERM by _exit(15) before Python starts, which then does not know by what: getsignal gives None.
HOSTED = """
import _imp, ctypes, importlib.util, signal, sys
libc = ctypes.CDLL(None)
libc.signal.argtypes = [ctypes.c_int, ctypes.c_void_p]
libc.signal(signal.SIGTERM, ctypes.cast(libc._exit, ctypes.c_void_p))
_imp.exec_builtin(_imp.create_builtin(importlib.util.find_spec("_signal")))
assert signal.getsignal(signal.SIGTERM) is None
from luthier.signals import answered
with answered(lambda: None):
    pass
print("left", flush=True)
signal.raise_signal(signal.SIGTERM)
"""


def test_both_are_answered_inside_and_as_before_after_it():
    before, asked = [signal.getsignal(number) for number in BOTH], []
    with answered(lambda: asked.append(1)):
        for number in BOTH:
            signal.raise_signal(number)
    assert asked == [1, 1]
    assert [signal.getsignal(number) for number in BOTH] == before


def test_a_signal_that_a_program_around_python_answers_stays_its_own():
    done = subprocess.run([sys.executable, "-c", HOSTED], capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr, done.returncode) == ("left\n", "", 15)
