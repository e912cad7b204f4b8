"""The startup and liveness probe of trainer pods: `python -m nemo_rl.worker.probe`. Exits with 0 if /healthz says that all is well.

A program within the pod, and no request of the kubelet: a sidecar may have the port, a mesh or a policy the network.
"""

from __future__ import annotations

import os
import sys
import urllib.error
import urllib.request
from pathlib import Path

SECONDS = 10.0


def health_file() -> Path:
    """Where this pod says at which address its /healthz is."""
    return Path(os.environ.get("TMPDIR") or "/tmp") / "nemo-rl-healthz"


def announce(port: int) -> None:
    """Leaves that address for the probe."""
    aside = health_file().with_suffix(f".{os.getpid()}")
    aside.write_text(f"http://127.0.0.1:{port}/healthz")
    aside.replace(health_file())


def main() -> int:
    try:
        with urllib.request.urlopen(health_file().read_text(), timeout=SECONDS) as answer:
            print(answer.read(1000).decode(errors="replace").strip())
            return 0
    except urllib.error.HTTPError as error:
        print(error.read(1000).decode(errors="replace").strip())
    except FileNotFoundError:
        print("not started: the processes of this pod do not run yet")
    except (OSError, ValueError) as error:
        print(f"no answer: {error}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
