"""The start of a job of several pods: each waits here, cheaply, until all of them run; before that no rank looks for another.

The pod with index 0 listens, the others come to it, and when all are there it sends them off. Nothing of torch is loaded,
and nothing fails because an image is pulled slowly, a node is still being made or a name is not known yet.

With a token both sides prove that they know it, and it never travels: a challenge each way, answered by HMAC-SHA256.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

REMIND_SECONDS = 30.0
"""Between two lines that say who is missing."""
RETRY_SECONDS = 1.0
"""Between two tries to reach the pod with index 0."""
WORD_SECONDS = 10.0
"""A pod that says nothing for this long while it introduces itself is sent away."""
TELL_SECONDS = 5.0
"""How often those who wait hear who is missing. After three silent turns they take the listener for lost and come anew."""
MOST_BYTES = 1 << 16
"""The longest line of the protocol."""


class MeetingFailed(Exception):
    """Not all pods came in time. `missing` are the numbers of those that did not, as far as this pod knows."""

    def __init__(self, message: str, missing: tuple[int, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


@dataclass(frozen=True)
class Party:
    """The pods that meet. `token` is the job's secret, empty where it has none."""

    nodes: int
    port: int
    token: bytes = b""
    say: Callable[[str], None] = print
    name: Callable[[int], str] = str
    """What a pod is called, by its number."""

    def missing(self, there: set[int]) -> tuple[int, ...]:
        return tuple(number for number in range(self.nodes) if number not in there)

    def named(self, numbers: tuple[int, ...]) -> str:
        """At most eight of them by name."""
        shown = ", ".join(self.name(number) for number in numbers[:8])
        return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown


# --- the pod with index 0


def host(party: Party, seconds: float) -> None:
    """Waits on `party.port` until all the others are there, and sends them off. MeetingFailed after `seconds`."""
    gathering = _Gathering(party)
    begin = time.monotonic()
    with _listener(party.port) as listener:
        threading.Thread(target=gathering.welcome, args=(listener,), daemon=True).start()
        remind, tell = begin + REMIND_SECONDS, begin + TELL_SECONDS
        while missing := gathering.missing():
            now = time.monotonic()
            if now - begin > seconds:
                gathering.close()
                raise MeetingFailed(
                    f"waited {seconds:.0f} s for all {party.nodes} pods, and {party.named(missing)} did not come",
                    missing,
                )
            if now >= remind:
                remind = now + REMIND_SECONDS
                party.say(_waiting(party, missing, now - begin))
            if now >= tell:
                tell = now + TELL_SECONDS
                gathering.tell({"missing": list(missing)})
            gathering.changed.wait(0.2)
            gathering.changed.clear()
        gathering.send_off()
    gathering.see_off()


class _Gathering:
    """Who is there; each of them has a connection, and who loses it is missing again."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self.changed = threading.Event()
        self._guests: dict[int, _Line] = {}
        self._lock = threading.Lock()
        self._over = False

    def missing(self) -> tuple[int, ...]:
        with self._lock:
            for number, line in list(self._guests.items()):
                if line.closed():
                    del self._guests[number]
            return self.party.missing({0, *self._guests})

    def welcome(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):  # the listener is closed when all are there
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=self._introduce, args=(connection,), daemon=True).start()

    def _introduce(self, connection: socket.socket) -> None:
        line = _Line(connection)
        challenge = secrets.token_hex(16)
        try:
            connection.settimeout(WORD_SECONDS)
            line.send({"challenge": challenge})
            word = line.read()
            number, answer = word.get("node"), str(word.get("challenge"))
            known = isinstance(number, int) and 0 < number < self.party.nodes
            if not known or not _proves(word, self.party.token, "join", number, challenge, answer):
                line.close()
                return
            line.mark = _proof(self.party.token, "go", number, answer, challenge)
        except (OSError, ValueError):
            line.close()
            return
        with self._lock:
            if self._over:
                line.close()
                return
            if old := self._guests.pop(number, None):
                old.close()
            self._guests[number] = line
        self.changed.set()

    def tell(self, word: dict[str, Any]) -> None:
        with self._lock:
            for line in self._guests.values():
                with contextlib.suppress(OSError):
                    line.send(word)

    def send_off(self) -> None:
        """Tells all to go."""
        with self._lock:
            self._over = True
            for line in self._guests.values():
                with contextlib.suppress(OSError):
                    line.send({"go": line.mark})

    def see_off(self) -> None:
        """Lets all of them close first: the port is wanted again in a moment, and must not linger on this side."""
        for line in self._guests.values():
            with contextlib.suppress(OSError, ValueError):
                line.connection.settimeout(WORD_SECONDS)
                line.read()
            line.close()

    def close(self) -> None:
        with self._lock:
            self._over = True
            for line in self._guests.values():
                line.close()


@contextlib.contextmanager
def _listener(port: int) -> Iterator[socket.socket]:
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    with socket.create_server(
        ("", port), family=family, backlog=1024, dualstack_ipv6=family == socket.AF_INET6
    ) as found:
        yield found
        with contextlib.suppress(OSError):
            found.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts


# --- the others


def join(party: Party, number: int, address: str, seconds: float) -> None:
    """Goes to the pod with index 0 at `address` and waits to be sent off. MeetingFailed after `seconds`."""
    visit = _Visit(party, number, address, seconds)
    while not visit.once():
        time.sleep(RETRY_SECONDS)


@dataclass
class _Visit:
    """One pod's way to the meeting, by as many tries as it takes."""

    party: Party
    number: int
    address: str
    seconds: float
    begin: float = field(default_factory=time.monotonic)
    missing: tuple[int, ...] = (0,)
    problem: str = ""
    _remind: float = field(default_factory=lambda: time.monotonic() + REMIND_SECONDS)

    def once(self) -> bool:
        """Whether it was sent off."""
        try:
            with socket.create_connection((self.address, self.party.port), timeout=WORD_SECONDS) as connection:
                return self._wait(_Line(connection))
        except (OSError, ValueError) as error:
            self.missing, self.problem = (0,), str(error) or type(error).__name__
            self._look_at_the_clock()
            return False

    def _wait(self, line: _Line) -> bool:
        party, challenge = self.party, secrets.token_hex(16)
        theirs = str(line.read().get("challenge"))
        proof = _proof(party.token, "join", self.number, theirs, challenge)
        line.send({"node": self.number, "challenge": challenge, "proof": proof})
        mark = _proof(party.token, "go", self.number, challenge, theirs)
        line.connection.settimeout(3 * TELL_SECONDS)
        while True:
            word = line.read()
            if "go" in word:
                if not hmac.compare_digest(str(word["go"]), mark):
                    raise ValueError("what answers there does not know the job's token")
                return True
            found = word.get("missing")
            self.missing = tuple(n for n in found if isinstance(n, int)) if isinstance(found, list) else ()
            self.problem = ""
            self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        now = time.monotonic()
        names = self.party.named(self.missing)
        why = f" ({self.problem})" if self.problem else ""
        if now - self.begin > self.seconds:
            raise MeetingFailed(
                f"waited {self.seconds:.0f} s for all {self.party.nodes} pods, and {names} did not come{why}",
                self.missing,
            )
        if now >= self._remind:
            self._remind = now + REMIND_SECONDS
            self.party.say(_waiting(self.party, self.missing, now - self.begin) + why)


def _waiting(party: Party, missing: tuple[int, ...], seconds: float) -> str:
    there = party.nodes - len(missing)
    return f"{there} of {party.nodes} pods are here; waiting for {party.named(missing)} since {seconds:.0f} s"


# --- lines and proofs


class _Line:
    """One JSON object a line, each way."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self.mark = ""
        self._rest = b""

    def send(self, word: dict[str, Any]) -> None:
        self.connection.sendall(json.dumps(word).encode() + b"\n")

    def read(self) -> dict[str, Any]:
        """The next word. ValueError for what is none, ConnectionError at the end."""
        while b"\n" not in self._rest:
            if len(self._rest) > MOST_BYTES:
                raise ValueError("too long a line")
            if not (more := self.connection.recv(4096)):
                raise ConnectionError("the connection was closed")
            self._rest += more
        line, self._rest = self._rest.split(b"\n", 1)
        try:
            word = json.loads(line)
        except RecursionError:
            raise ValueError("too deep a line") from None
        if not isinstance(word, dict):
            raise ValueError(f"found {line[:80]!r}, expected an object")
        return word

    def closed(self) -> bool:
        """Whether the other side is gone. It has nothing to say while it waits."""
        limit = self.connection.gettimeout()
        try:
            self.connection.setblocking(False)
            return self.connection.recv(1, socket.MSG_PEEK) == b""
        except BlockingIOError:
            return False
        except OSError:
            return True
        finally:
            with contextlib.suppress(OSError):
                self.connection.settimeout(limit)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self.connection.close()


def _proof(token: bytes, *parts: object) -> str:
    return hmac.new(token, "|".join(map(str, parts)).encode(), hashlib.sha256).hexdigest()


def _proves(word: dict[str, Any], token: bytes, *parts: object) -> bool:
    return hmac.compare_digest(str(word.get("proof")).encode(), _proof(token, *parts).encode())
