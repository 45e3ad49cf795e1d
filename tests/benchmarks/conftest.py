"""The scripts under benchmarks/ import one another by name."""

import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent.parent.parent / "benchmarks"))
