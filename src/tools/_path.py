"""Importing this module puts src/ on the path, so that programs in this folder find sppo."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
