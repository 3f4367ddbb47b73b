"""Replays recorded golden sets against this implementation.

    python scripts/check_golden.py DIR [--only NAME ...] [--verbose]

DIR contains pairs of ``NAME.json`` and ``NAME.safetensors``; the kind of a set is the key ``set`` of its JSON, and
sizes, options and seeds are read from it. One line is printed per set: its name, the number of comparisons, the largest
absolute and relative error (norm of the difference / norm), the tolerance, and whether it is ok. Statistics of random
draws are judged in standard errors. The exit status is 1 if anything is off, a set is unknown, or nothing was found.

Everything runs on the CPU in float32, as the recordings did.
"""

import os
import sys
from pathlib import Path

# Not at import, because the processes that a replay starts import this file again.
if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])  # run by path from a clone: make both packages importable
    # Everything is tiny: more threads would only wait for each other. Read by torch and BLAS when they are imported.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from scripts.golden.check import main

    sys.exit(main())
