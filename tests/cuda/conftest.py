"""The samples and comparisons of the operators' tests, next door."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "kernels"))
