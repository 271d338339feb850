"""What is told when nobody listens any more."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[3]
TELLER = """
import sys, time
from pipeline.terminal import tell
tell("ready")
sys.stdin.readline()
for _ in range(3):
    tell("nobody hears this")
print("still here", flush=True)
"""


def test_a_terminal_that_goes_away():
    with subprocess.Popen(
        [sys.executable, "-c", TELLER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    ) as process:
        assert process.stderr.readline() == "ready\n"
        process.stderr.close()
        process.stdin.write("\n")
        process.stdin.flush()
        assert process.stdout.readline() == "still here\n"
        assert process.wait(timeout=30) == 0
