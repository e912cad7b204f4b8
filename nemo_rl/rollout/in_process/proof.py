"""The proof of rollouts: before step 1 a few completions are sampled and compared with the plain model, and the fastest right way of decoding is taken."""

from __future__ import annotations

import logging

import torch

from nemo_rl.model.kinds import describe
from nemo_rl.model.policy import Policy, transformers_version
from nemo_rl.model.probe import TOLERANCE, exact, plain_logits
from nemo_rl.rollout.in_process.decode import decode
from nemo_rl.rollout.in_process.ways import CACHE, ONE_LENGTH, PACKED, WAYS, Rollout, new_state
from nemo_rl.rollout.protocol import Completion, Sampling

log = logging.getLogger(__name__)

NEW_TOKENS = 10
ENDS = 7
"""Every seventh token ends a completion, so that rows end at different times and the cache is cut."""
CHANCE = 0.1
"""As in `nemo_rl.model.proof`: no more tokens than this may differ, and then other tokens decide."""


def prove_rollouts(policy: Policy) -> Rollout:
    """Chooses the way of decoding, once for a policy, and returns it. Raises ValueError if none is right."""
    if policy.rollout is not None:
        return policy.rollout
    failures = []
    for way in (PACKED, *WAYS) if policy.layout == "packed" else WAYS:
        policy.rollout = Rollout(way, (0.0, 1.0))
        try:
            reason = _fault(policy)
        except torch.OutOfMemoryError:
            policy.rollout = None
            raise
        except Exception as error:  # whatever a family's code raises, it cannot be decoded in this way
            text = str(error).strip().splitlines()
            reason = f"{type(error).__name__}: {text[0][:200] if text else ''}"
        if reason is None:
            if way in (PACKED, CACHE, ONE_LENGTH):
                policy.rollout = Rollout(way, _cache_bytes(policy))
            if way not in (PACKED, CACHE):
                log.warning("rollouts of %s run with %s: %s", describe(policy.causal), way, "; ".join(failures))
            return policy.rollout
        log.debug("rollouts by way %r are not used: %s", way, reason)
        failures.append(f"{way}: {reason}")
    policy.rollout = None
    raise ValueError(
        f"{describe(policy.causal)} cannot be sampled from right: no way of decoding agrees with the plain model of "
        f"transformers {transformers_version()} ({'; '.join(failures)}); GRPO needs another model or another version"
    )


def _fault(policy: Policy) -> str | None:
    """Returns what is wrong with the way of decoding that `policy.rollout` names, None if it is right to TOLERANCE."""
    with exact(policy.causal), policy.in_float32():
        bad, worst = _errors(policy, seed=31)
        if bad.any() and bad.float().mean() <= CHANCE:
            again, _ = _errors(policy, seed=37)
            if not again.any():
                return None
    return f"log-probabilities of what was sampled differ by up to {worst:.2g} nats" if bad.any() else None


def _errors(policy: Policy, seed: int) -> tuple[torch.Tensor, float]:
    """Returns which of the tokens of sampled and greedy completions are wrong, and the largest error."""
    probe = policy.probe
    short = max(2, min(5, probe.longest - NEW_TOKENS))
    longest = max(short + 1, probe.longest - NEW_TOKENS)
    prompts = [probe.ids(n, seed + n) for n in (short, longest, max(short, longest // 2))]
    rows = policy.head.weight.shape[0]
    ends = list(range(seed % ENDS, rows, ENDS))
    new = max(1, min(NEW_TOKENS, probe.longest - longest))
    drawn = decode(policy, new_state(policy), prompts, Sampling(2, new), end_ids=ends, seed=seed, step=0)
    greedy = Sampling(1, min(new, 4), greedy=True)
    best = decode(policy, new_state(policy), prompts[:2], greedy, end_ids=ends, seed=seed, step=0)
    off = [
        *(_off(policy, p, c, False) for p, group in zip(prompts, drawn, strict=True) for c in group),
        *(_off(policy, p, c, True) for p, group in zip(prompts[:2], best, strict=True) for c in group),
    ]
    errors = torch.cat(off)
    return errors > TOLERANCE, errors.max().item()


@torch.no_grad()
def _off(policy: Policy, prompt: list[int], completion: Completion, greedy: bool) -> torch.Tensor:
    """Returns how far each token's log-probability is from the plain model's; of greedy ones also from the likeliest token's."""
    logprobs = plain_logits(policy.causal, prompt + completion.ids).log_softmax(-1)[len(prompt) - 1 : -1]
    tokens = torch.tensor(completion.ids, device=policy.device)
    truth = logprobs.gather(-1, tokens[:, None]).squeeze(-1)
    off = (torch.tensor(completion.logprobs, device=policy.device) - truth).abs()
    if greedy:
        off = torch.maximum(off, logprobs.amax(-1) - truth)
    return torch.nan_to_num(off, nan=torch.inf)


def _cache_bytes(policy: Policy) -> tuple[float, float]:
    """Returns the constant and the growing part of one row's cache, measured beyond the model's windows where they are short."""
    sizes = []
    lengths = (max(2, policy.probe.longest // 2), max(4, policy.probe.longest))
    for length in lengths:
        state = new_state(policy)
        with state.running():
            state.prefill([policy.probe.ids(length, 5)], 1, length)
        sizes.append(state.cache_size())
    each = max(0.0, (sizes[1] - sizes[0]) / (lengths[1] - lengths[0]))
    return max(0.0, sizes[1] - each * lengths[1]), each
