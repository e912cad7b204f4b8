"""A training pass over a vocabulary of 151,936 must not hold tokens x vocabulary numbers; measured in a fresh process."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

VOCABULARY = 151_936

PROGRAM = """
import json, resource, torch
from transformers import AutoModelForCausalLM, Qwen2Config
from nemo_rl.model import Policy
from nemo_rl.packing import TokenSequence, pack

torch.set_num_threads(1)
config = Qwen2Config(vocab_size=VOCABULARY, hidden_size=8, num_hidden_layers=1, num_attention_heads=1,
                     num_key_value_heads=1, intermediate_size=8, tie_word_embeddings=True)
policy = Policy(AutoModelForCausalLM.from_config(config), "fp32")

def bytes_per_token(path, tokens):
    "The growth of the peak when one pass has so many tokens instead of 64."
    policy.path = path
    for number in (64, 64, tokens):  # the first makes the gradients that stay
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        batch = pack([TokenSequence(list(range(1, 34)), 1) for _ in range(number // 32)])
        policy.logprobs(batch).sum().backward()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / (tokens - 64)

assert policy.path == "packed"
print(json.dumps([bytes_per_token("packed", 512), bytes_per_token("hidden", 512), bytes_per_token("logits", 192)]))
""".replace("VOCABULARY", str(VOCABULARY))


@pytest.mark.slow
def test_peak_memory_does_not_grow_with_tokens_times_vocabulary():
    # one arena and no cached free memory: the peak is then that of the live tensors
    environment = {**os.environ, "MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    packed, hidden, logits = json.loads(done.stdout)
    assert packed < VOCABULARY * 4 / 50
    assert hidden < VOCABULARY * 4 / 50
    assert logits > VOCABULARY * 4, "the measurement must see logits where they are made"
