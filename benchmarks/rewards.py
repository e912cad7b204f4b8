"""How long 512 calls of a slow reward take with one worker process and with several.

    python benchmarks/rewards.py [--calls 512] [--seconds 0.2] [--workers 1,8]

The reward waits, as one does for a sandbox or a server, so that the machine's cores set no limit. Prints a table; the ideal is
calls x seconds / workers.
"""

from __future__ import annotations

import argparse
import time

from nemo_rl.environments import RewardCall, RewardRunner, bind_rewards


def measure(calls: int, seconds: float, workers: int, groups: int = 32) -> float:
    """Seconds from the first submitted group to the last score."""

    def slow(prompt: str, response: str) -> float:
        time.sleep(seconds)
        return float(len(response))

    with RewardRunner(bind_rewards(slow), timeout_seconds=60, on_error="raise", workers=workers) as runner:
        runner.score([RewardCall("p", "warm")] * workers)
        begin = time.perf_counter()
        size = calls // groups
        futures = [runner.submit([RewardCall("p", "r" * i) for i in range(size)]) for _ in range(groups)]
        scores = [outcome.value for future in futures for outcome in runner.wait(future)]
        taken = time.perf_counter() - begin
    assert scores == [float(i) for _ in range(groups) for i in range(size)]
    return taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=int, default=512)
    parser.add_argument("--seconds", type=float, default=0.2)
    parser.add_argument("--workers", default="1,8")
    options = parser.parse_args()
    print("| reward_workers | ideal (s) | measured (s) |\n| ---: | ---: | ---: |")
    for workers in map(int, options.workers.split(",")):
        taken = measure(options.calls, options.seconds, workers)
        print(f"| {workers} | {options.calls * options.seconds / workers:.1f} | {taken:.1f} |", flush=True)


if __name__ == "__main__":
    main()
