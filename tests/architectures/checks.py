"""What is checked of each model type, each against the plain model: transformers' own forward, one sequence at a time."""

from __future__ import annotations

import copy
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from architectures.tiny_models import END, VOCABULARY, make_model

LOGPROB = 1e-3
"""nats"""
GRADIENT = 1e-3
"""relative to the norm of the plain model's gradient"""
SAVED = 1e-5

NOT_DECODERS = "Not a decoder"


@dataclass
class Report:
    """What was found of one type. `checks`: what was measured; `failures`: what is wrong; `refusal`: our sentence."""

    type: str
    name: str = ""
    path: str = ""
    rollouts: str = ""
    refusal: str = ""
    lora: str = ""
    recompute: str = ""
    checks: dict[str, float] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    not_built: str = ""
    seconds: float = 0.0
    """Of a processor, for all of it."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def check(model_type: str) -> Report:
    """Makes a tiny model of the type and checks it."""
    started = time.process_time()
    report = _checked(model_type)
    report.seconds = time.process_time() - started
    return report


def _checked(model_type: str) -> Report:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from nemo_rl.model.kinds import refusal_of

    warnings.simplefilter("ignore")
    report = Report(model_type)
    try:
        model = make_model(model_type)
        report.name = type(model).__name__
    except Exception as error:
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
        report.refusal = refusal_of(name, model_type) or ""  # it needs no weights
        report.not_built = "" if report.refusal else _line(error)
        return report
    return _Checks(model, report).run()


def _line(error: BaseException) -> str:
    where = next(
        (f"{Path(f.filename).name}:{f.lineno}" for f in reversed(traceback.extract_tb(error.__traceback__))), ""
    )
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]} [{where}]"


class _Checks:
    def __init__(self, model: nn.Module, report: Report) -> None:
        self.model, self.report = model, report

    def run(self) -> Report:
        from nemo_rl.job.spec import TrainingSpec
        from nemo_rl.model.load import prepare_model
        from nemo_rl.model.policy import Policy
        from nemo_rl.rollout.in_process.proof import prove_rollouts

        report = self.report
        pristine = copy.deepcopy(self.model)
        try:
            self.model = prepare_model(self.model, TrainingSpec(), torch.device("cpu"))
            self.policy = Policy(self.model, "fp32")
            report.path = self.policy.path
            report.rollouts = prove_rollouts(self.policy).way
        except ValueError as error:
            report.refusal = str(error)
            return report
        self._try("log-probabilities", self.logprobs, LOGPROB)
        self._try("gradient of GRPO", lambda: self.gradient(self.policy, grouped()), GRADIENT)
        self._try("gradient of SFT", lambda: self.gradient(self.policy, separate()), GRADIENT)
        self._try("greedy rollouts", self.greedy, LOGPROB)
        self._try("sampled rollouts", self.sampled, LOGPROB)
        self._try("checkpoint", self.round_trip, SAVED)
        self.recompute(copy.deepcopy(pristine))
        self.lora(copy.deepcopy(pristine))
        return report

    def _try(self, name: str, measure: Callable[[], float], limit: float) -> None:
        try:
            found = self.report.checks[name] = measure()
        except Exception as error:
            self.report.failures[name] = _line(error)
            return
        if not found <= limit:
            self.report.failures[name] = f"off by {found:.2g}"

    # ------------------------------------------------------------------ training

    @torch.no_grad()
    def logprobs(self) -> float:
        from nemo_rl.model.packing import pack

        worst = 0.0
        for sequences in (grouped(), separate()):
            batch = pack(sequences)
            found = self.policy.logprobs(batch)
            for i, sequence in enumerate(sequences):
                truth = trained(self.model, sequence)
                worst = max(worst, (found[batch.rows_S == i] - truth).abs().max().item())
        return worst

    def gradient(self, policy: Any, sequences: list[Any]) -> float:
        """The relative error of the gradient of a weighted sum of log-probabilities, over several micro-batches."""
        from nemo_rl.model.packing import pack, plan_microbatches

        parameters = policy.trainable
        weights = torch.randn(len(sequences), generator=torch.Generator().manual_seed(5))
        found = torch.zeros(sum(p.numel() for p in parameters))
        for members in plan_microbatches(sequences, 60):
            batch = pack([sequences[i] for i in members])
            each = weights[torch.tensor(members)[batch.rows_S]]
            found += flat(
                torch.autograd.grad((policy.logprobs(batch) * each).sum(), parameters, allow_unused=True), parameters
            )
        policy.set_recomputing(False)
        plain = torch.zeros_like(found)
        for sequence, weight in zip(sequences, weights, strict=True):
            loss = (trained(policy.causal, sequence) * weight).sum()
            plain += flat(torch.autograd.grad(loss, parameters, allow_unused=True), parameters)
        return ((found - plain).norm() / plain.norm()).item()

    def recompute(self, model: nn.Module) -> None:
        """Activation checkpointing gives the plain gradient, or a sentence that names the keyword to drop."""
        from nemo_rl.job.spec import TrainingSpec
        from nemo_rl.model.load import prepare_model
        from nemo_rl.model.policy import Policy

        try:
            policy = Policy(prepare_model(model, TrainingSpec(), torch.device("cpu")), "fp32", recompute=True)
        except ValueError as error:
            self.report.recompute = str(error)
            if "leave out activation_checkpointing" not in str(error):
                self.report.failures["activation checkpointing"] = str(error)
            return
        self.report.recompute = "right"
        self._try("activation checkpointing", lambda: self.gradient(policy, grouped()), GRADIENT)

    # ------------------------------------------------------------------ rollouts

    def greedy(self) -> float:
        from nemo_rl.rollout.in_process.engine import generate
        from nemo_rl.rollout.protocol import Sampling

        prompts = some_prompts()
        groups = generate(self.policy, prompts, Sampling(3, 12, greedy=True), end_ids=[END], seed=0, step=1)
        worst = 0.0
        for prompt, group in zip(prompts, groups, strict=True):
            truth = self._likeliest(prompt, 12)
            assert all(completion.ids == truth for completion in group), f"{group[0].ids} is not {truth}"
            worst = max(worst, self._off(prompt, group))
        return worst

    @torch.no_grad()
    def _likeliest(self, prompt: list[int], tokens: int) -> list[int]:
        ids = list(prompt)
        for _ in range(tokens):
            ids.append(int(self.model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
            if ids[-1] == END:
                break
        return ids[len(prompt) :]

    def sampled(self) -> float:
        from nemo_rl.rollout.in_process.engine import generate
        from nemo_rl.rollout.protocol import Sampling

        prompts, ends = some_prompts(), list(range(1, 14))
        groups = generate(self.policy, prompts, Sampling(5, 14), end_ids=ends, seed=3, step=1)
        lengths = {len(c.ids) for group in groups for c in group}
        assert len(lengths) > 1, "rows must end at different times"
        return max(self._off(prompt, group) for prompt, group in zip(prompts, groups, strict=True))

    @torch.no_grad()
    def _off(self, prompt: list[int], group: list[Any]) -> float:
        worst = 0.0
        for completion in group:
            truth = plain_logprobs(self.model, prompt + completion.ids)[len(prompt) - 1 :]
            worst = max(worst, (torch.tensor(completion.logprobs) - truth).abs().max().item())
        return worst

    # ------------------------------------------------------------------ files

    def round_trip(self) -> float:
        """A checkpoint loads as a model with the same log-probabilities, and its weights come back into another one exactly."""
        from nemo_rl.run.checkpoint import load_into, read_checkpoint, write_checkpoint

        with tempfile.TemporaryDirectory() as folder:
            path = write_checkpoint(Path(folder) / "c", 1, model=self.model, tokenizer=None, state={})
            off = _reloaded(path, self.model)
            if off > SAVED:  # is that transformers' own?
                self.model.save_pretrained(Path(folder) / "plain")
                if abs(_reloaded(Path(folder) / "plain", self.model) - off) < 1e-6:
                    self.report.checks["transformers' own save and load"] = off
                    off = 0.0
            fresh = make_model(self.report.type, seed=9)
            load_into(read_checkpoint(path), fresh)
            loaded = dict(fresh.named_parameters())
            wrong = [n for n, p in self.model.named_parameters() if not torch.equal(p, loaded[n])]
            assert not wrong, f"{len(wrong)} weights do not come back, first {wrong[0]}"
            return off

    def lora(self, model: nn.Module) -> None:
        """Adapters train right, and the merged checkpoint is the adapted model; or a sentence that names the keyword."""
        from nemo_rl.job.spec import TrainingSpec
        from nemo_rl.model.load import prepare_model
        from nemo_rl.model.policy import Policy
        from nemo_rl.run.checkpoint import write_checkpoint

        try:
            adapted = prepare_model(model, TrainingSpec(lora_rank=2), torch.device("cpu"))
            policy = Policy(adapted, "fp32")
        except ValueError as error:
            self.report.lora = str(error)
            if "lora" not in str(error):
                self.report.failures["LoRA"] = str(error)
            return
        except Exception as error:
            self.report.failures["LoRA"] = _line(error)
            return
        self.report.lora = "right"
        generator = torch.Generator().manual_seed(4)
        with torch.no_grad():
            for parameter in policy.trainable:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
        self._try("LoRA", lambda: self.gradient(policy, grouped()), GRADIENT)

        def merged() -> float:
            with tempfile.TemporaryDirectory() as folder:
                path = write_checkpoint(Path(folder) / "c", 1, model=adapted, tokenizer=None, state={})
                return _reloaded(path, policy.causal)

        own = self.report.checks.get("transformers' own save and load", 0.0)
        self._try("LoRA, merged", merged, max(1e-4, 2 * own))


@torch.no_grad()
def _reloaded(path: Path, model: nn.Module) -> float:
    """Returns how far the log-probabilities of the saved model are from those of the one in memory."""
    from transformers import AutoModelForCausalLM

    again = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = ids_of(20, 4)
    return (plain_logprobs(again, ids) - plain_logprobs(model, ids)).abs().max().item()


# ---------------------------------------------------------------------- truth and data


def ids_of(length: int, seed: int) -> list[int]:
    return torch.randint(5, VOCABULARY - 1, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def some_prompts() -> list[list[int]]:
    return [ids_of(n, 80 + n) for n in (3, 11, 7, 19)]


def separate() -> list[Any]:
    """Sequences of many lengths, with boundaries and masks."""
    from nemo_rl.model.packing import TokenSequence

    found = [TokenSequence(ids_of(n, i), 1 + i % 3) for i, n in enumerate((4, 17, 9, 26, 5))]
    return [*found, TokenSequence(ids_of(15, 40), 1, mask=[i % 3 != 0 for i in range(15)])]


def grouped() -> list[Any]:
    """Two prompts with three completions each."""
    from nemo_rl.model.packing import TokenSequence

    found = []
    for group in range(2):
        prompt = ids_of(5 + 6 * group, 50 + group)
        for sample in range(3):
            ids = prompt + ids_of(1 + 5 * sample, 60 + 3 * group + sample)
            found.append(TokenSequence(ids, len(prompt), group=group, shared=len(prompt)))
    return found


def plain_logprobs(model: nn.Module, ids: list[int]) -> Tensor:
    logits = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0].float()
    return logits[:-1].log_softmax(-1).gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


def trained(model: nn.Module, sequence: Any) -> Tensor:
    values = plain_logprobs(model, sequence.ids)
    if sequence.mask is not None:
        return values[torch.tensor(sequence.mask[1:])]
    return values[sequence.first_target - 1 :]


def flat(gradients: Any, parameters: list[Tensor]) -> Tensor:
    return torch.cat(
        [(torch.zeros_like(p) if g is None else g).flatten() for p, g in zip(parameters, gradients, strict=True)]
    )
