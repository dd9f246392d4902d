"""For `python -m infer` and `python -m train`, whose packages import this first.

Python looks for modules in the working folder before all others, and that may hold a convert.py or train.py of its own.
"""

import sys
from pathlib import Path

# "-m" stands there while Python looks for the module that it is to run; a program that imports us is left alone.
_started = sys.argv[:1] == ["-m"] and not sys.flags.safe_path
if _started and not Path(__file__).parents[2].samefile(sys.path[0] or "."):
    sys.path.append(sys.path.pop(0))
