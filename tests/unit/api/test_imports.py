"""Importing the front doors loads nothing heavy, and every public name is there."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = {"torch", "transformers", "datasets", "kubernetes", "numpy", "kopf", "pandas", "matplotlib"}


def _loaded(code: str) -> set[str]:
    output = subprocess.check_output([sys.executable, "-c", f"{code}\nimport sys; print(*sys.modules)"], text=True)
    return {name.split(".")[0] for name in output.split()}


@pytest.mark.parametrize(
    "code",
    [
        "import nemo_rl; dir(nemo_rl)",
        "import nemo_rl.job.spec, nemo_rl.job.manifest, nemo_rl.job.names",
        "import nemo_rl.api; nemo_rl.api.train; nemo_rl.api.TrainResult; nemo_rl.api.list_algorithms()",
        "import nemo_rl.cli.main, nemo_rl.cli.train",
        "import nemo_rl; nemo_rl.train, nemo_rl.RewardError, nemo_rl.TrainResult, nemo_rl.attach",
        "import nemo_rl; nemo_rl.Environment, nemo_rl.reward_function, nemo_rl.batched_reward",
        "import nemo_rl; nemo_rl.Callback, nemo_rl.EarlyStoppingCallback, nemo_rl.DataModule",
        "import nemo_rl.backends; nemo_rl.backends.choose('local')",
    ],
)
def test_no_heavy_module_is_loaded(code: str):
    assert not _loaded(code) & HEAVY


def test_importing_the_package_alone_loads_no_pydantic_either():
    assert "pydantic" not in _loaded("import nemo_rl, nemo_rl.job, nemo_rl.api, nemo_rl.cli")


def test_a_refused_call_loads_no_torch():
    code = """
import nemo_rl
try:
    nemo_rl.train("m", [{"prompt": "x"}], lambda prompt, response, answer: 1.0)
except TypeError as error:
    assert "answer" in str(error)
else:
    raise SystemExit("not refused")
"""
    assert not _loaded(code) & HEAVY


def test_every_public_name_can_be_had():
    import nemo_rl
    import nemo_rl.api

    for module in (nemo_rl, nemo_rl.api):
        for name in module.__all__:
            assert getattr(module, name) is not None
            assert name in dir(module)


def test_an_unknown_name_is_an_attribute_error_that_lists_the_known_ones():
    import nemo_rl

    with pytest.raises(AttributeError, match="GRPOTrainer"):
        _ = nemo_rl.PPOTrainer
    assert not hasattr(nemo_rl, "nonsense")


def test_cluster_calls_say_what_they_need(monkeypatch: pytest.MonkeyPatch):
    import nemo_rl
    from nemo_rl import backends

    monkeypatch.setattr(backends, "_has_kubernetes_backend", lambda: False)
    with pytest.raises(RuntimeError, match=r"attach\(\) needs the kubernetes backend"):
        nemo_rl.attach("job")
    with pytest.raises(RuntimeError, match=r"jobs\(\) needs the kubernetes backend"):
        nemo_rl.jobs()


def test_the_algorithms_are_listed_and_found_by_name():
    from nemo_rl.api import get_algorithm, list_algorithms

    assert list_algorithms() == ["grpo", "sft", "dpo"]
    assert get_algorithm("DPO").__name__ == "DPOTrainer"
    with pytest.raises(ValueError, match="Unknown algorithm 'ppo'"):
        get_algorithm("ppo")
