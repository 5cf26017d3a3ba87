"""Importing this module puts src/, the folder of the package sppo, on Python's import path."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
