"""Importing this puts src/, which holds the package sppo, on the path of a program in this folder."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
