"""vLLM's plugin (entry point `vllm.general_plugins`): makes our weight transfer known in each of its processes."""

from __future__ import annotations

BACKEND = "nemo_rl"
"""Name of our weight transfer in `--weight-transfer-config`."""


def register() -> None:
    """Called by vLLM in each of its processes; nothing of torch or vLLM is imported before."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "nemo_rl.rollout.vllm.receiver", "SafetensorsEngine")
