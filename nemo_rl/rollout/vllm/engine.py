"""Rollouts by vLLM servers: keeps them at the weights that are trained, proves it, and spreads requests over them."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch

from nemo_rl.errors import RolloutLost, WeightSyncMismatch
from nemo_rl.job.spec import MAX_REPLICAS, RolloutSpec
from nemo_rl.model.packing import TokenSequence, pack
from nemo_rl.model.policy import Policy
from nemo_rl.rollout.protocol import Completion, Request, Sampling
from nemo_rl.rollout.sync import LIMITS, NEW_TOKENS, Verdict, mean_difference, mismatch, probe_prompts
from nemo_rl.rollout.vllm import scratch
from nemo_rl.rollout.vllm.client import MODEL, Client, RequestRefused, ServerGone
from nemo_rl.rollout.vllm.fetch import TOKEN_VARIABLE
from nemo_rl.rollout.vllm.replicas import Replicas, addresses_of_job, token_of_job
from nemo_rl.rollout.vllm.server import ServerProcess
from nemo_rl.rollout.vllm.weights import Published, Publisher, ShardServer, files_in, own_address
from nemo_rl.run.ranks import Ranks

log = logging.getLogger(__name__)

ROWS_PER_SERVER = 256
"""Completions that wait at one server at most; the others wait here, where another server may take them."""
SECONDS_PER_TOKEN = 0.5
"""What a completion may take at most, beside the time that the run waits for a server."""
HEALTH_EVERY = 10.0
LOOK_EVERY = 1.0
MEET_SECONDS = 2.0
"""How long rollouts wait at their begin for servers to say that they have the weights of now."""
LATE_SECONDS, LATE_FACTOR = 30.0, 3.0
"""A server that takes longer to load a version than this, and than so many times the fastest one, is not waited for."""
PROVED = "+proved"
"""What the first rank adds to the version of a server that has passed the gate; without it no rank takes its tokens."""
PROBE_LENGTH = 80
"""Tokens that a server takes at least, for the probe."""
CPU_CACHE_BYTES = 512 * 2**20
ADAPTER = "policy-adapter"
"""Name under which servers serve the model with the LoRA adapter that is trained."""


@dataclass(eq=False)
class Member:
    """One server, as a rank sees it. `instance` is the process that is trusted; tokens of any other are not taken."""

    client: Client
    model: str
    """Name of what completions are asked of."""
    instance: str = ""
    pending: int = 0
    refused: str = ""
    next_look: float = 0.0
    """When a lost one is looked for again, by the monotonic clock."""
    started: set[str] = field(default_factory=set)
    """Processes in which the transfer of weights was set up."""
    version: int | None = None
    """The newest one that it has proved to have."""
    rate: int | None = None
    """Tokens that it sampled in a second of the last rollouts."""
    lost: str = ""
    """How it was lost, in words; empty where it was not."""
    late: bool = False
    """Whether it is brought to the weights of now while the others go on."""
    asleep: bool = False
    """Whether its GPU's memory is the trainer's, as the first rank knows."""
    overdue: bool = False
    """Whether a load of an earlier version is still under way that took far longer than those of others."""


class VLLMRollouts:
    """Implements `RolloutEngine`. The first rank owns the child process, publishes weights and runs the gate."""

    replicas: Replicas | None = None
    """Finds the job's rollout replicas, where it has some."""
    spent: Mapping[str, int] = {}
    """Tokens of each server, by its address, that this rank got since the last update of weights."""
    busy: Mapping[str, float] = {}
    """Seconds in which each server, by its address, had requests of this rank. A slow one is busy while others wait for it."""
    sleep_level = 0
    """How servers sleep while the model trains. 2: the next update brings all weights. 1: those below an adapter never travel
    again, and stay in main memory. 0: not at all."""
    resting = False
    tell: Callable[[list[dict[str, Any]]], None] = staticmethod(lambda servers: None)

    def __init__(
        self,
        spec: RolloutSpec,
        policy: Policy,
        tokenizer: Any,
        ranks: Ranks,
        *,
        end_ids: list[int],
        longest: int,
        probe: Sampling,
        log_file: Path,
        poll: Callable[[], None],
        note: Callable[[str], None],
        tell: Callable[[list[dict[str, Any]]], None] = lambda _: None,
    ) -> None:
        """Starts the server, or reaches those of `spec.urls`, or the job's replicas. `longest`: tokens of the longest prompt and
        completion together.

        `probe`: how the run samples. `tell` gets what is known of each server, whenever that may have changed, on the first
        rank and from any thread. Raises ValueError and RolloutLost, in words.
        """
        longest = max(longest, PROBE_LENGTH)
        self.spec, self.ranks, self.end_ids = spec, ranks, end_ids
        self.poll, self.note, self.tell = poll, note, tell
        self.version: int | None = None
        self.proved_version = ""
        """What a server tells that has the weights of now and has passed the gate."""
        self.published: Published | None = None
        self.dtype = policy.dtype
        self.adapter = hasattr(policy.model, "peft_config") and spec.weight_transfer in ("auto", "adapter")
        if spec.sleep:
            self.sleep_level = 1 if self.adapter else 2
        self.probe = Sampling(1, NEW_TOKENS, probe.temperature, probe.top_k, probe.top_p)
        self.prompts = probe_prompts(min(policy.head.weight.shape[0], len(tokenizer)), longest)
        self.limit = spec.mismatch_limit or LIMITS[str(self.dtype).removeprefix("torch.")]
        self.process: ServerProcess | None = None
        self.shards: ShardServer | None = None
        self.folder: Path | None = None
        self.members: list[Member] = []
        self.returning: dict[Member, Future[str]] = {}
        """Servers of somebody else that were lost and are looked for, while the others sample."""
        self.pool: ThreadPoolExecutor | None = None
        self._expected: list[tuple[list[int], list[float]]] = []
        """What the probe gave under the weights of now, by the trainer's own log-probabilities."""
        if ranks.is_first:
            self.folder = scratch.make("nemo-rl-rollout-")
        self.publisher = Publisher(self.folder, self.dtype)
        try:
            if self.adapter:  # the server's own weights are the base, which stays as it is
                self.publisher.write_base(policy.model)
            reached = ranks.first(lambda: self._reach(policy, tokenizer, longest, log_file))
            self.token = reached["token"]
            self.members = [
                Member(Client(url, self.token), ADAPTER if self.adapter else model)
                for url, model in zip(reached["urls"], reached["models"], strict=True)
            ]
            if spec.replicas and not ranks.is_first:
                self.replicas = Replicas(addresses_of_job(), self.token)
            most = MAX_REPLICAS if spec.replicas else len(self.members)
            self.pool = ThreadPoolExecutor(64 * most, thread_name_prefix="rollout")
        except BaseException:
            self.close()
            raise

    # ------------------------------------------------------------------ servers

    def _reach(self, policy: Policy, tokenizer: Any, longest: int, log_file: Path) -> dict[str, Any]:
        assert self.folder is not None
        if self.spec.urls:
            token = os.environ.get(TOKEN_VARIABLE, "")
            if not token:
                raise ValueError(
                    f"rollout urls are given, but {TOKEN_VARIABLE} is not set; set it to the word that the servers were started "
                    "with, here and there"
                )
            if self.spec.weight_transfer != "files":
                parts = urlsplit(self.spec.urls[0])
                host = own_address(parts.hostname or "127.0.0.1", parts.port or 80)
                self.shards = ShardServer(self.folder, token, host)
            models = [self._until_ready(Client(url, token)) for url in self.spec.urls]
            return {"urls": list(self.spec.urls), "models": models, "token": token}
        model = self.folder / "model"
        model.mkdir(exist_ok=True)
        config = copy.deepcopy(policy.causal.config)
        config.architectures = [type(policy.causal).__name__]  # a model made from its configuration alone has none
        config.save_pretrained(model)
        tokenizer.save_pretrained(model)
        if self.spec.replicas:
            return self._reach_replicas(policy, longest, model)
        self.process = ServerProcess(str(self.spec.python), model, self._options(policy, longest), log_file)
        self.note(f"starting a vLLM server for rollouts with {self.spec.python}; its log: {log_file}")
        started = time.perf_counter()
        client = self.process.start(self.poll, self.spec.timeout_seconds)
        self.note(f"the vLLM server was ready after {time.perf_counter() - started:.0f} s")
        if self.spec.weight_transfer == "http":
            self.shards = ShardServer(self.folder, self.process.token)
        return {"urls": [client.url], "models": [MODEL], "token": self.process.token}

    def _reach_replicas(self, policy: Policy, longest: int, model: Path) -> dict[str, Any]:
        """Has the job's replicas started, and waits for the first that serves; the others join when they do."""
        addresses, token = addresses_of_job(), token_of_job()
        assert self.folder is not None
        self.shards = shards = ShardServer(self.folder, token, host="")
        about = {"files": files_in(model), "options": self._options(policy, longest)}
        if self.spec.gpus_per_replica > 1:
            about["options"] += ["--tensor-parallel-size", str(self.spec.gpus_per_replica)]
        self.note(f"waiting for rollout replicas at {addresses}")
        self.replicas = Replicas(
            addresses,
            token,
            start=lambda url: {"source": f"{shards.url_for(url)}/{model.name}", **about},
            changed=lambda: self.tell(self.report()),
        )
        started = time.perf_counter()
        self.replicas.wait_for_one(self.spec.timeout_seconds, self.poll)
        urls = self.replicas.serving()
        self.note(f"rollout replicas ready after {time.perf_counter() - started:.0f} s: {', '.join(urls)}")
        return {"urls": urls, "models": [MODEL] * len(urls), "token": token}

    def find_members(self) -> None:
        """Takes in replicas that serve by now, and forgets those that DNS does not give any more."""
        if self.replicas is None:
            return
        self.replicas.look()
        members = {member.client.url: member for member in self.members}
        for url in self.replicas.serving():
            if url not in members:
                members[url] = self._new_member(url)
        listed = set(self.replicas.known)
        self.members = [m for url, m in sorted(members.items()) if url in listed or m.pending or m in self.returning]

    def _new_member(self, url: str) -> Member:
        return Member(Client(url, self.token), ADAPTER if self.adapter else MODEL)

    def serves(self, member: Member) -> bool:
        """Whether it is worth to ask a server that was lost: of replicas that is known."""
        return self.replicas is None or member.client.url in self.replicas.serving()

    def _options(self, policy: Policy, longest: int) -> list[str]:
        length = self.spec.max_model_length or longest
        options = ["--dtype", str(self.dtype).removeprefix("torch."), "--served-model-name", MODEL]
        options += ["--max-model-len", str(length)]
        options += ["--load-format", "auto" if self.adapter else "dummy"]  # the first update brings the weights
        if (self.probe.top_k is not None or self.probe.top_p < 1.0) and self.probe.temperature == 1.0:
            # processed ones are of what top_k and top_p leave; the trainer's are of the whole distribution
            options += ["--logprobs-mode", "raw_logprobs"]
        on_cpu = self.spec.gpus_per_replica == 0 if self.spec.replicas else policy.device.type == "cpu"
        if on_cpu:
            options += ["--enforce-eager", "--max-num-seqs", "64", "--kv-cache-memory-bytes", str(CPU_CACHE_BYTES)]
        else:
            options += ["--gpu-memory-utilization", str(self.spec.gpu_memory_fraction)]
            if self.sleep_level:
                options += ["--enable-sleep-mode"]
        if self.adapter:
            config = policy.model.peft_config[policy.model.active_adapter]
            options += ["--enable-lora", "--max-lora-rank", str(_lora_rank(config.r)), "--max-loras", "1"]
        return options

    def _until_ready(self, client: Client) -> str:
        """Waits for a server of somebody else, and returns the name of its model."""
        deadline = time.monotonic() + self.spec.timeout_seconds
        while True:
            self.poll()
            try:
                client.get("/health", timeout=10)
                return str(client.get("/v1/models").content["data"][0]["id"])
            except ServerGone as error:
                if time.monotonic() > deadline:
                    raise RolloutLost(f"{error}, for {self.spec.timeout_seconds:.0f} s; see the server's log") from None
                time.sleep(0.5)

    # ------------------------------------------------------------------ weights

    def update(self, policy: Policy, version: int) -> dict[str, float]:
        if self.resting:
            self._leave_memory(policy)
        if self.version == version:
            return {}
        started = time.perf_counter()
        self._measure_rates()
        published = self.publisher.publish(policy.model, version, adapter=self.adapter)
        published_at = time.perf_counter()
        self.version, self._expected = None, []  # until servers have passed the gate
        if published is not None:
            self.published = published
        probes = self.ranks.first(lambda: self._load_everywhere())
        loaded_at = time.perf_counter()
        self._follow([url for url, *_ in probes])
        members = {member.client.url: member for member in self.members}
        verdicts = []
        known_lost = {name for name, member in members.items() if member.lost}
        for name, completions, failure, gone in probes:
            member = members[name]
            difference, ours = None, []
            if not failure:
                ours = self._score(policy, completions)
                difference = mean_difference([c.logprobs for c in completions], ours)
            verdict = Verdict(name, difference, self.limit, failure)
            if verdict.good and not self._expected:
                self._expected = [(c.ids, mine) for c, mine in zip(completions, ours, strict=True)]
            verdicts.append(verdict)
            member.refused = "" if verdict.good or gone else failure or f"differs by {difference:.3g} nats a token"
            member.lost = failure if gone else ""
            if gone:
                member.instance = ""
            elif verdict.good:
                member.version, member.late = version, False
        self.tell(self.report())
        if not any(verdict.good for verdict in verdicts):
            if all(gone for _, _, _, gone in probes):
                raise RolloutLost(f"no rollout server is left: {'; '.join(failure for _, _, failure, _ in probes)}")
            raise WeightSyncMismatch(self._words(policy, version, verdicts))
        for name, _, failure, gone in probes:
            member = members[name]
            if gone and name not in known_lost and self.ranks.is_first:
                self.note(f"{failure}; the others go on, and it is given version {version} when it is back")
            elif member.refused and self.ranks.is_first:
                self.note(f"rollout server {member.client.url} is refused at version {version}: {member.refused}")
        self.proved_version = self.ranks.first(self._mark_proved)
        self.version = version
        metrics = {
            "weight_sync_seconds": time.perf_counter() - started,
            "weight_publish_seconds": published_at - started,
            "weight_load_seconds": loaded_at - published_at,
            "rollout_probe": max(v.difference for v in verdicts if v.good and v.difference is not None),
        }
        return metrics

    def rest(self) -> None:
        if not self.sleep_level or self.resting:
            return
        self.ranks.first(self._sleep)
        self.resting = True
        if self.sleep_level == 2:  # they are gone, and come with the next update
            self.version, self._expected = None, []

    def _sleep(self) -> None:
        for member in self.members:
            try:
                member.client.sleep(self.sleep_level)
                member.asleep = True
            except ServerGone as error:  # a new one is started when it is needed
                log.warning("%s", error)
            except RequestRefused as error:
                self.note(f"{error}; it keeps its memory while the model trains")

    def _leave_memory(self, policy: Policy) -> None:
        """Wakes servers, for which no rank keeps memory in reserve."""
        if policy.device.type == "cuda":
            torch.cuda.empty_cache()
        self.ranks.gather(lambda: None)
        self.resting = False
        self.ranks.first(self._wake)

    def _wake(self) -> None:
        for member in self.members:
            if member.asleep:
                member.asleep = False
                try:
                    member.client.wake_up()
                except (ServerGone, RequestRefused) as error:  # seen again, and healed, by what is asked of it next
                    log.warning("%s", error)

    def _follow(self, urls: list[str]) -> None:
        """The other ranks have the servers that the first rank loaded; those that join later they find by themselves."""
        if self.ranks.is_first or self.replicas is None:
            return
        known = {member.client.url: member for member in self.members}
        self.members = [known.get(url) or self._new_member(url) for url in sorted({*urls, *known})]

    def _measure_rates(self) -> None:
        """Tokens a second of each server, over all ranks and since the update before."""
        parts = self.ranks.gather(lambda: (self.spent, self.busy))
        for member in self.members:
            url = member.client.url
            tokens = [part[0][url] for part in parts if url in part[0]]
            seconds = max(part[1].get(url, 0.0) for part in parts)
            member.rate = round(sum(tokens) / seconds) if tokens and seconds > 0 else None
        self.spent, self.busy = {}, {}

    def report(self) -> list[dict[str, Any]]:
        """What is known of each server: address, state, weight_version, tokens_per_second, message."""
        found = {}
        replicas = self.replicas.known if self.replicas is not None else {}
        for url, replica in replicas.items():
            state = "Lost" if replica.served and not replica.serving else "Loading"
            found[url] = {"state": state, "message": replica.message or "it gets the weights of now"}
        for member in self.members:
            url = member.client.url
            about: dict[str, Any] = {"weight_version": member.version, "tokens_per_second": member.rate}
            if member.refused:
                about |= {"state": "Refused", "message": member.refused}
            elif member.late and member.version is not None:
                about |= {"state": "Updating", "message": "it is brought to the weights of now, while the others go on"}
            elif member.version is not None and not member.lost and (url not in replicas or replicas[url].serving):
                about |= {"state": "Ready", "message": None}
            elif url in found:
                about |= found[url]
            else:
                about |= {"state": "Lost", "message": member.lost or None}
            found[url] = about
        return [{"address": urlsplit(url).netloc, **about} for url, about in sorted(found.items())]

    def _words(self, policy: Policy, version: int, verdicts: list[Verdict]) -> str:
        config = policy.causal.config.get_text_config()
        dtype, trained = (str(d).removeprefix("torch.") for d in (self.dtype, policy.dtype))
        tied = bool(getattr(config, "tie_word_embeddings", False))
        return mismatch(version, verdicts, tied=tied, dtype=dtype, trained=trained)

    def _load_everywhere(self) -> list[tuple[str, list[Completion], str, bool]]:
        """Of each server its name, what it made of the probe, what failed, and whether it is gone; on the first rank.

        While all servers of somebody else are gone, it waits for one, for `timeout_seconds` at most.
        """
        deadline = time.monotonic() + self.spec.timeout_seconds
        waits = False
        while True:
            self.find_members()
            found = self._load_each()
            if self.process is not None or not all(gone for *_, gone in found) or time.monotonic() > deadline:
                return found
            if not waits:
                first = found[0][2] if found else "there is no rollout replica"
                self.note(f"{first}; waiting for a rollout server for at most {self.spec.timeout_seconds:.0f} s")
                waits = True
            self.poll()
            time.sleep(0.5)

    def _load_each(self) -> list[tuple[str, list[Completion], str, bool]]:
        assert self.pool is not None
        # one that already loads far longer than the others is not asked for another version before it has that
        for member in self.members:
            member.overdue = member.overdue and member in self.returning and not self.returning[member].done()
        ready = [m for m in self.members if self.serves(m) and not m.overdue]
        work = {m: self.pool.submit(self._load_newest, m, self.returning.pop(m, None)) for m in ready}
        self._attend(list(work.items()), self.poll, self._patience(list(work.values())))
        found = []
        for member in self.members:
            future = work.get(member)
            if future is None or not future.done():
                loads = future is not None or member.overdue
                why = "it still loads, and others are ready" if loads else "it does not serve"
                found.append((member.client.url, [], f"the rollout server at {member.client.url}: {why}", True))
                if future is not None:
                    member.late = member.overdue = True
                    self.returning[member] = self.pool.submit(_ended, future)
                continue
            try:
                found.append((member.client.url, future.result(), "", False))
            except (ServerGone, RequestRefused) as error:
                if self.process is None:
                    found.append((member.client.url, [], str(error), isinstance(error, ServerGone)))
                    continue
                self.note(f"{error}; starting a new one")
                try:
                    found.append((member.client.url, self._restart(member, self.poll), "", False))
                except (ServerGone, RequestRefused) as again:
                    text = f"{again}; its log ends with: {self.process.tail()}"
                    found.append((member.client.url, [], text, isinstance(again, ServerGone)))
        return found

    def _restart(self, member: Member, poll: Callable[[], None]) -> list[Completion]:
        """Starts the child process anew, loads the weights of now, and returns what it makes of the probe."""
        assert self.process is not None
        self.process.start(poll, self.spec.timeout_seconds)
        return self._load_and_probe_attended(member, poll)

    def _bring_back_own(self, member: Member, poll: Callable[[], None]) -> list[Completion]:
        assert self.process is not None
        if self.process.alive:
            try:
                return self._load_and_probe_attended(member, poll)
            except (ServerGone, RequestRefused) as error:  # what answers HTTP outlives the engine for a while
                log.warning("%s", error)
        self.note("the vLLM server is gone; starting a new one")
        return self._restart(member, poll)

    def _load_and_probe_attended(self, member: Member, poll: Callable[[], None]) -> list[Completion]:
        assert self.pool is not None
        future = self.pool.submit(self._load_and_probe, member)
        self._attend([(member, future)], poll)
        return future.result()

    def _patience(self, loads: Sequence[Future[Any]]) -> Callable[[], bool]:
        """Whether to wait on for loads of one version: not for those that take far longer than the fastest one did."""
        began = time.monotonic()
        limit = math.inf

        def patient() -> bool:
            nonlocal limit
            took = time.monotonic() - began
            if limit == math.inf and any(load.done() and load.exception() is None for load in loads):
                limit = max(LATE_SECONDS, LATE_FACTOR * took)
            return took < limit

        return patient

    def _attend(
        self,
        work: Sequence[tuple[Member, Future[Any]]],
        poll: Callable[[], None],
        patient: Callable[[], bool] = lambda: True,
    ) -> None:
        """Waits for what servers do. One whose engine has died never answers, and ends only when nobody waits any more."""
        next_health = time.monotonic() + HEALTH_EVERY
        while not all(future.done() for _, future in work) and patient():
            wait([future for _, future in work], timeout=0.2)
            poll()
            if time.monotonic() >= next_health:
                give_up_dead([member for member, future in work if not future.done()])
                next_health = time.monotonic() + HEALTH_EVERY

    def _load_newest(self, member: Member, earlier: Future[str] | None) -> list[Completion]:
        """`_load_and_probe`, after what is still under way: two updates of a server at once would end each other."""
        if earlier is not None:
            wait([earlier])
        return self._load_and_probe(member)

    def _load_and_probe(self, member: Member) -> list[Completion]:
        published = self.published
        assert published is not None
        client = member.client
        instance = client.get("/weight_info").instance
        base = self.shards.url_for(client.url) if self.shards is not None else None
        source = f"{base}/{published.folder.name}" if base else str(published.folder)
        if published.adapter:
            client.load_adapter(source, published.files, ADAPTER, published.name)
        else:
            update = {"source": source, "shards": published.files, "tied": published.tied}
            client.load(update, published.name, first=instance not in member.started)
            member.started.add(instance)
        told = client.weight_version()
        if told.content != published.name or told.instance != instance:
            raise RequestRefused(
                f"the rollout server at {client.url} says that it has version {told.content}, expected {published.name}",
                200,
            )
        member.instance = instance
        completions, answered = client.complete(
            self.prompts, self.probe, end_ids=[], seed=0, model=member.model, timeout=self.spec.timeout_seconds
        )
        if answered != instance:
            raise ServerGone(f"the rollout server at {client.url} was started anew during the probe")
        return completions

    @torch.no_grad()
    def _score(self, policy: Policy, completions: Sequence[Completion]) -> list[list[float]]:
        """The trainer's own log-probabilities of the probe's completions. Every rank computes them."""
        sequences = [
            TokenSequence(prompt + completion.ids, len(prompt))
            for prompt, completion in zip(self.prompts, completions, strict=True)
        ]
        batch = pack(
            sequences, policy.device, None if policy.sharded is None else 1
        )  # each view is a pass of all ranks
        values = policy.logprobs(batch, self.probe.temperature)
        parts = values.split([sequences[i].num_targets for i in batch.order])
        found: list[list[float]] = [[] for _ in sequences]
        for i, part in zip(batch.order, parts, strict=True):
            found[i] = part.tolist()
        return found

    def _mark_proved(self) -> str:
        """Tells the servers that have passed the gate so; other ranks ask them. Returns the version that they then tell."""
        assert self.published is not None
        name = self.published.name + PROVED
        for member in self.members:
            if member.instance and not member.refused:
                with contextlib.suppress(ServerGone, RequestRefused):  # then it is brought back when it is needed
                    member.client.post("/update_weight_version", {"new_version": name})
        return name

    # ------------------------------------------------------------------ completions

    def generate(
        self,
        requests: Sequence[Request],
        sampling: Sampling,
        *,
        seed: int,
        step: int,
        poll: Callable[[], None] = lambda: None,
        on_group: Callable[[int, list[Completion]], None] | None = None,
        on_tokens: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        def done(i: int, completions: list[Completion]) -> None:
            if on_tokens is not None:
                on_tokens(sum(len(completion.ids) for completion in completions))
            if on_group is not None:
                on_group(i, completions)

        return _Generation(self, requests, sampling, seed, step, poll, done).run()

    def proved(self, member: Member) -> str:
        """The process of a server that has the weights of now and has passed the gate; "" while there is none."""
        with contextlib.suppress(ServerGone, RequestRefused):
            told = member.client.weight_version()
            if told.content == self.proved_version:
                return told.instance
        return ""

    def find_again(self, member: Member, poll: Callable[[], None]) -> str:
        """The process of a server that was lost and may be asked again; "" while there is none."""
        found = self.proved(member)
        return self.proved(member) if not found and self.bring_back(member, poll) else found

    def bring_back(self, member: Member, poll: Callable[[], None]) -> bool:
        """Brings a server that was lost to the weights of now, and whether it may be used. Only the first rank can."""
        if not self.ranks.is_first:
            return False
        version = self.version
        try:
            if self.process is None:
                completions = self._load_and_probe(member)
            else:
                completions = self._bring_back_own(member, poll)
        except (ServerGone, RequestRefused) as error:
            log.warning("%s", error)
            return False
        expected = self._expected
        if not expected:  # newer weights are due, and it gets them next
            return False
        theirs, ours = [], []
        for completion, (ids, logprobs) in zip(completions, expected, strict=True):
            same = next((i for i, (a, b) in enumerate(zip(completion.ids, ids, strict=False)) if a != b), len(ids))
            theirs.append(completion.logprobs[:same])
            ours.append(logprobs[:same])
        difference = mean_difference(theirs, ours)
        if sum(map(len, ours)) < len(ours) or difference > self.limit:
            member.refused = f"differs by {difference:.3g} nats a token"
            return False
        member.refused = ""
        try:
            member.client.post("/update_weight_version", {"new_version": self.proved_version})
        except (ServerGone, RequestRefused) as error:
            log.warning("%s", error)
            return False
        member.version = version if version is not None else member.version
        return True

    def abort(self) -> None:
        """Ends what is asked of the servers, for another thread than that which waits for it."""
        for member in self.members:
            member.client.abort()

    def close(self) -> None:
        if self.replicas is not None:
            self.replicas.close()  # first: that connections end now is no news of the servers
        self.abort()
        if self.pool is not None:
            self.pool.shutdown(wait=False, cancel_futures=True)
        if self.process is not None:
            self.process.close()
        if self.shards is not None:
            self.shards.close()
        if self.folder is not None:
            scratch.remove(self.folder)


class _Generation:
    """One call of `generate`: which requests wait, which are under way at which server, and which are done."""

    def __init__(
        self,
        engine: VLLMRollouts,
        requests: Sequence[Request],
        sampling: Sampling,
        seed: int,
        step: int,
        poll: Callable[[], None],
        on_group: Callable[[int, list[Completion]], None] | None,
    ) -> None:
        self.engine, self.requests, self.sampling, self.poll, self.on_group = engine, requests, sampling, poll, on_group
        self.seeds = [request_seed(seed, step, request.key) for request in requests]
        self.waiting = sorted(range(len(requests)), key=lambda i: len(requests[i].ids))
        self.under_way: dict[Future[tuple[list[Completion], str]], tuple[int, Member]] = {}
        self.busy_since: dict[Member, float] = {}
        self.groups: list[list[Completion]] = [[] for _ in requests]
        self.timeout = engine.spec.timeout_seconds + SECONDS_PER_TOKEN * sampling.max_new_tokens
        self.per_server = max(1, ROWS_PER_SERVER // sampling.num_samples)
        self.lost_since: float | None = None
        self.failing_since: float | None = None
        """When requests began to fail without one that succeeded since."""
        self.next_health = time.monotonic() + HEALTH_EVERY

    def run(self) -> list[list[Completion]]:
        self._meet()
        try:
            while self.waiting or self.under_way:
                self.poll()
                self._restore()
                self._submit()
                done, _ = wait(self.under_way, timeout=0.1, return_when=FIRST_COMPLETED)
                for future in done:
                    self._take(future)
                self._look_after()
            self._check_unchanged()
            return self.groups
        finally:
            for member in list(self.busy_since):
                self._note_busy(member)
            if self.under_way:
                for future in self.under_way:
                    future.cancel()
                for member in self.engine.members:
                    member.client.abort()

    def _meet(self) -> None:
        """Asks all servers at once which of them may be asked. One that does not answer in time is not waited for."""
        engine = self.engine
        assert engine.pool is not None
        engine.find_members()
        looks: dict[Member, Future[str]] = {}
        for member in engine.members:
            member.pending = 0
            if not member.refused and member not in engine.returning:
                looks[member] = engine.pool.submit(engine.proved, member)
        deadline = time.monotonic() + MEET_SECONDS
        while not all(look.done() for look in looks.values()) and time.monotonic() < deadline:
            self.poll()
            wait(list(looks.values()), timeout=0.1)
        for member in engine.members:
            look = looks.get(member)
            member.instance = look.result() if look is not None and look.done() else ""
            if look is not None and not look.done():
                engine.returning[member] = look

    def _submit(self) -> None:
        assert self.engine.pool is not None
        while self.waiting:
            ready = [m for m in self.engine.members if m.instance and not m.refused and m.pending < self.per_server]
            if not ready:
                return
            member = min(ready, key=lambda m: m.pending)
            i = self.waiting.pop(0)
            if not member.pending:
                self.busy_since[member] = time.monotonic()
            member.pending += 1
            future = self.engine.pool.submit(
                member.client.complete,
                [self.requests[i].ids],
                self.sampling,
                end_ids=self.engine.end_ids,
                seed=self.seeds[i],
                model=member.model,
                version=self.engine.version or 0,
                timeout=self.timeout,
            )
            self.under_way[future] = i, member

    def _take(self, future: Future[tuple[list[Completion], str]]) -> None:
        """A request counts once: when its whole answer is here, from the process that has passed the gate."""
        i, member = self.under_way.pop(future)
        member.pending -= 1
        if not member.pending:
            self._note_busy(member)
        try:
            completions, instance = future.result()
        except ServerGone as error:
            log.warning("%s; its requests are repeated", error)
            member.instance, member.lost = "", str(error)
            self.waiting.insert(0, i)
            self.failing_since = self.failing_since or time.monotonic()
            if time.monotonic() - self.failing_since > self.timeout:
                raise RolloutLost(f"no request has succeeded for {self.timeout:.0f} s; the last one: {error}") from None
            return
        if instance != member.instance:
            member.instance, member.lost = "", "another process answers in its place"
            self.waiting.insert(0, i)
            return
        self.failing_since = None
        url = member.client.url
        tokens = sum(len(completion.ids) for completion in completions)
        self.engine.spent = {**self.engine.spent, url: self.engine.spent.get(url, 0) + tokens}
        self.groups[i] = completions
        if self.on_group is not None:
            self.on_group(i, completions)

    def _note_busy(self, member: Member) -> None:
        url, since = member.client.url, self.busy_since.pop(member, None)
        if since is not None:
            self.engine.busy = {**self.engine.busy, url: self.engine.busy.get(url, 0.0) + time.monotonic() - since}

    def _restore(self) -> None:
        """Finds lost servers again, or brings them back; RolloutLost where there has been none for too long."""
        engine = self.engine
        engine.find_members()
        for member in [member for member, future in engine.returning.items() if future.done()]:
            found = engine.returning.pop(member).result()
            member.instance = "" if member.refused else found
            member.next_look = 0.0 if found else time.monotonic() + LOOK_EVERY
            if found:
                member.lost, member.late = "", False
            if engine.ranks.is_first:
                engine.tell(engine.report())
        lost = [m for m in engine.members if not (m.instance or m.refused or m.pending)]
        for member in lost:
            if engine.process is not None:
                member.instance = engine.find_again(member, self.poll)
            elif member not in engine.returning and time.monotonic() >= member.next_look and engine.serves(member):
                assert engine.pool is not None
                member.late = True
                engine.returning[member] = engine.pool.submit(engine.find_again, member, lambda: None)
        if any(member.instance or member.pending for member in engine.members):
            self.lost_since = None
            return
        refused = [f"{member.client.url}: {member.refused}" for member in engine.members if member.refused]
        if refused and len(refused) == len(engine.members):
            raise WeightSyncMismatch(
                f"no rollout server has version {engine.version} of the weights any more: {'; '.join(refused)}"
            )
        self.lost_since = self.lost_since or time.monotonic()
        if not engine.returning and time.monotonic() - self.lost_since > engine.spec.timeout_seconds:
            raise RolloutLost(
                f"no rollout server has been ready for {engine.spec.timeout_seconds:.0f} s; see the servers' logs, or raise "
                "rollout's timeout_seconds"
            )
        time.sleep(0.1)

    def _check_unchanged(self) -> None:
        """Raises WeightSyncMismatch where the process that sampled has been given other weights meanwhile, by somebody else."""
        for member in self.engine.members:
            if not member.instance or member.refused:
                continue
            with contextlib.suppress(ServerGone, RequestRefused):  # lost since; what it has sampled is here
                told = member.client.weight_version()
                loaded = told.content.removesuffix(PROVED)  # a replica that joins late may be given the same once more
                if told.instance == member.instance and loaded != self.engine.proved_version.removesuffix(PROVED):
                    raise WeightSyncMismatch(
                        f"the rollout server at {member.client.url} was given version {told.content} of somebody's weights while it "
                        f"sampled with {self.engine.proved_version}; give each server to one run only"
                    )

    def _look_after(self) -> None:
        """Gives up a server that does not answer any more, although its connections stand."""
        if time.monotonic() < self.next_health:
            return
        give_up_dead({*self.engine.returning, *(member for _, member in self.under_way.values())})
        self.next_health = time.monotonic() + HEALTH_EVERY


def _ended(future: Future[Any]) -> str:
    """Waits for a load that nobody else waits for. What it loaded may be old by then, so that the server is looked at anew."""
    wait([future])
    return ""


def give_up_dead(members: Iterable[Member]) -> None:
    """Ends the requests to servers that are not healthy any more, although their connections stand."""
    for member in members:
        try:
            member.client.get("/health", timeout=HEALTH_EVERY)
        except (ServerGone, RequestRefused) as error:
            log.warning("%s", error)
            member.client.abort()


def request_seed(seed: int, step: int, key: int) -> int:
    """The seed of a request, below 2**62: vLLM adds the number of each of its samples."""
    digest = hashlib.sha256(f"{seed} {step} {key}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 2


def _lora_rank(rank: int) -> int:
    """The next rank that vLLM has kernels for."""
    return next((known for known in (1, 8, 16, 32, 64, 128, 256, 320, 512) if known >= rank), rank)
