"""The rollout replicas of a job on a cluster: found by DNS, told which model to serve, and watched, in a thread of its own."""

from __future__ import annotations

import logging
import os
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from nemo_rl.errors import RolloutLost
from nemo_rl.job import names
from nemo_rl.rollout.vllm.client import Client, RequestRefused, ServerGone
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.middleware import REPLICA_ROUTE, START_ROUTE, STOP_ROUTE
from nemo_rl.rollout.vllm.replica import digest_of

log = logging.getLogger(__name__)

LOOK_SECONDS = 2.0
"""Between two looks at which replicas there are, and what they do."""
INLINE_SECONDS = 0.2
CHECK_SECONDS = 10.0
"""What a replica may take to answer such a look."""


@dataclass
class Replica:
    """One address that DNS gives for the job's replicas."""

    client: Client
    serving: bool = False
    """Whether its vLLM server answers, and was started for this run's model."""
    served: bool = False
    """Whether it ever did."""
    message: str = ""
    """What it does instead of serving, in words."""
    check: Future[None] | None = None


def addresses_of_job() -> str:
    """Where the operator says that the replicas are. Raises ValueError where there is no operator."""
    found = os.environ.get(names.ROLLOUT_ADDRESSES_VARIABLE, "")
    if not found:
        raise ValueError(
            "rollout replicas are pods that the operator runs for a job on a cluster, and this is none; here give "
            "rollout_python, an interpreter that has vLLM, or urls of servers"
        )
    return found


def token_of_job() -> str:
    """The word by which trainer and replicas of this job know each other. Raises ValueError where there is none."""
    found = os.environ.get(TOKEN_VARIABLE, "")
    if not found:
        try:
            found = Path(names.ROLLOUT_TOKEN_FILE).read_text().strip()
        except OSError:
            raise ValueError(
                f"the job has rollout replicas, but neither {TOKEN_VARIABLE} nor {names.ROLLOUT_TOKEN_FILE} holds their token; "
                "the operator mounts it there"
            ) from None
    return found


def resolve(addresses: str) -> list[str] | None:
    """The address, as http://host:port, of every replica that `host:port,host:port` stands for; None where DNS does not answer.

    A name without addresses is no failure: all replicas may be gone for a moment.
    """
    found: set[str] = set()
    for entry in addresses.split(","):
        host, _, port = entry.strip().rpartition(":")
        try:
            for *_, place in socket.getaddrinfo(host.strip("[]"), int(port), type=socket.SOCK_STREAM):
                ip = str(place[0])
                found.add(f"http://[{ip}]:{place[1]}" if ":" in ip else f"http://{ip}:{place[1]}")
        except socket.gaierror as error:
            if error.errno in (socket.EAI_NONAME, getattr(socket, "EAI_NODATA", socket.EAI_NONAME)):
                continue
            log.warning("the rollout replicas' name %s is not resolved: %s", host, error)
            return None
    return sorted(found)


class Replicas:
    """Keeps an eye on the replicas of a job. Those that wait are told what to serve where `start` is given: the first rank's part."""

    def __init__(
        self,
        addresses: str,
        token: str,
        start: Callable[[str], dict[str, Any]] | None = None,
        changed: Callable[[], None] = lambda: None,
    ) -> None:
        """`start` gives for a replica's address what to serve it from: source, files and options. `changed` is called after
        each look."""
        self.addresses, self.token = addresses, token
        self._start, self._changed = start, changed
        self.known: dict[str, Replica] = {}
        """By address; replaced as a whole, never changed."""
        self._stopped = threading.Event()
        self._looked = 0.0
        self._pool = ThreadPoolExecutor(16, thread_name_prefix="replicas")
        if start is not None:
            threading.Thread(target=self._run, name="replicas", daemon=True).start()

    # ------------------------------------------------------------------ for the engine

    def serving(self) -> list[str]:
        """Addresses of the replicas whose server answers."""
        return [url for url, replica in self.known.items() if replica.serving]

    def wait_for_one(self, timeout: float, poll: Callable[[], None]) -> None:
        """Until a replica serves; RolloutLost in words where none does in time."""
        deadline = time.monotonic() + timeout
        while not self.serving():
            poll()
            if time.monotonic() > deadline:
                seen = "; ".join(f"{url}: {replica.message}" for url, replica in self.known.items())
                raise RolloutLost(
                    f"no rollout replica was ready within {timeout:.0f} s ({seen or 'there is none'}); see their pods and their "
                    "logs, or raise rollout's timeoutSeconds where nodes or images take longer"
                )
            time.sleep(0.1)

    def look(self) -> None:
        """Looks now, where that was not just done: for ranks without the thread."""
        if self._start is None and time.monotonic() - self._looked > LOOK_SECONDS:
            self._look()

    def close(self) -> None:
        self._stopped.set()
        for replica in self.known.values():
            replica.client.abort()
        self._pool.shutdown(wait=False, cancel_futures=True)

    # ------------------------------------------------------------------ looking

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._look()
                if not self._stopped.is_set():  # else what is seen is the end of this run
                    self._changed()
            except RuntimeError:  # the pool of a run that ends takes nothing more
                return
            except Exception:
                log.exception("looking for rollout replicas failed; it is tried again")
            self._stopped.wait(LOOK_SECONDS)

    def _look(self) -> None:
        self._looked = time.monotonic()
        found = resolve(self.addresses)
        if found is not None:
            self.known = {url: self.known.get(url) or Replica(Client(url, self.token)) for url in found}
        checks = []
        for url, replica in self.known.items():
            if replica.check is None or replica.check.done():  # one that hangs holds up no other
                replica.check = self._pool.submit(self._check, url, replica)
                checks.append(replica.check)
        # those who look themselves sample meanwhile, and see at the next look what took longer
        deadline = time.monotonic() + (LOOK_SECONDS if self._start is not None else INLINE_SECONDS)
        for check in checks:
            while not check.done() and time.monotonic() < deadline:
                time.sleep(0.01)

    def _check(self, url: str, replica: Replica) -> None:
        """What a replica does now; one that waits is told to start."""
        client = replica.client
        try:
            told = client.get(REPLICA_ROUTE, timeout=CHECK_SECONDS).content
            state = told.get("state")
            if state == "serving" and self._start is not None and told.get("start") != self._digest(url):
                client.post(STOP_ROUTE, timeout=CHECK_SECONDS)
                replica.serving, replica.message = False, "it served another run, and is started anew"
            elif state == "serving":
                client.get("/health", timeout=CHECK_SECONDS)
                replica.serving, replica.served, replica.message = True, True, ""
            elif state == "waiting" and self._start is not None:
                client.post(START_ROUTE, self._start(url), timeout=CHECK_SECONDS)
                replica.serving = False
                replica.message = told.get("message") or "it fetches the model"
            else:
                replica.serving, replica.message = False, "it loads the model"
        except (ServerGone, RequestRefused, AttributeError) as error:
            replica.serving, replica.message = False, str(error)

    def _digest(self, url: str) -> str:
        assert self._start is not None
        start = self._start(url)
        return digest_of(start["files"], start["options"])


def host_of(url: str) -> str:
    """Host and port of an address, as a status shows them."""
    return urlsplit(url).netloc
