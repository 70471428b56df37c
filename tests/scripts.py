"""evaluate.py as a module, though it is none of the package's and its folder is on nobody's path."""

import importlib.util
import sys
from pathlib import Path

EVALUATE = Path(__file__).parents[1] / "evaluate.py"

_spec = importlib.util.spec_from_file_location("evaluate_script", EVALUATE)
evaluate = sys.modules["evaluate_script"] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(evaluate)
