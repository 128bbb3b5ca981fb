"""PPO killed, filled up, damaged, misled and resumed for an hour, then compared with the run that nobody disturbed.

    __main__   the command          setting   model, data, config and environment of the runs
    play       the disturbed side   start     one start of a run, watched from outside
    faults     what befalls it      judge     the reward function, inside the run: it also carries faults in
    verdict    what must hold       system    what /proc and /dev/shm say

What kills, fills disks and compares run folders is that of the tests (tests/killing.py, full_disk.py, same_run.py).
"""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT / "tests") not in sys.path:
    sys.path.append(str(ROOT / "tests"))


class SoakError(Exception):
    """An expectation of the soak does not hold."""
