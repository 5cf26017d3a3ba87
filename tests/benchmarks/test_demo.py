"""The benchmark of the whole demo: today's code still plans the earlier demo's work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
PROGRAM = REPOSITORY / "benchmarks" / "demo.py"


@pytest.mark.skipif(not (REPOSITORY / ".git").exists(), reason="this copy has no git history")
def test_the_earlier_demo_can_be_planned():
    done = subprocess.run([sys.executable, PROGRAM, "--dry-run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-1] == "the same work can be planned"
