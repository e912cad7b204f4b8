"""`python -m cluster.quick_operator run ...`: the operator, but for its patience, which is cut to what a test can wait.

These times are no options: nobody has a reason to change them on a cluster. Everything else is the operator as shipped.
"""

from __future__ import annotations

from nemo_rl.job import names
from nemo_rl_operator import main, progress
from nemo_rl_operator.policies import follow, retry

BUNDLE_WAIT_SECONDS = 4


def hurry() -> None:
    names.BUNDLE_WAIT_SECONDS = BUNDLE_WAIT_SECONDS
    progress.INTERVAL = 0.3
    progress.LONGEST_INTERVAL = 1.0
    retry.COUNTED_BASE = 0.2
    retry.FREE_BASE = 0.1
    retry.LONGEST_DELAY = 0.5
    follow.QUIET_SECONDS = 1.0
    follow.LOOK_SECONDS = 1.0


if __name__ == "__main__":
    hurry()
    main.main()
