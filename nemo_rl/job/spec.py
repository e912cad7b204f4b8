"""The specification of a training job, as pydantic models: the single source of every field, default, bound and description.

Python names are snake_case; YAML names are the camelCase of the same words. Unknown names are refused everywhere.
"""

from __future__ import annotations

import re
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic.alias_generators import to_camel
from pydantic_core import PydanticCustomError

from nemo_rl.job import names, uris
from nemo_rl.job.decode import too_deep

Algorithm = Literal["grpo", "sft", "dpo"]
ALGORITHMS: tuple[Algorithm, ...] = ("grpo", "sft", "dpo")

LEARNING_RATES: dict[Algorithm, tuple[float, float]] = {"grpo": (1e-6, 1e-5), "sft": (2e-5, 1e-4), "dpo": (5e-7, 1e-5)}
"""Peak learning rates where none is given: of all weights, and of low-rank adapters."""


READING = {"reading": True}
"""Validation context of readers: limits that older versions did not have do not hold for what is there already."""


class Section(BaseModel):
    """Base of all sections: camelCase outside, snake_case inside, unknown fields refused."""

    model_config = ConfigDict(
        alias_generator=to_camel,
        populate_by_name=True,
        extra="forbid",
        use_attribute_docstrings=True,
        validate_assignment=True,
        validate_default=True,
        allow_inf_nan=False,
    )

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: Any, info: ValidationInfo) -> Any:
        if isinstance(value, bool) and _takes_numbers_only(cls.model_fields[str(info.field_name)].annotation):
            raise PydanticCustomError("number_type", "Input should be a number, not true or false")
        return value


def _takes_numbers_only(annotation: Any) -> bool:
    """Whether a field takes int or float, and not bool besides."""
    if get_origin(annotation) in (Annotated, Union, UnionType):
        parts = [part for part in get_args(annotation) if isinstance(part, type) or get_origin(part)]
        return bool not in parts and any(map(_takes_numbers_only, parts))
    return annotation in (int, float)


ObjectName = Annotated[
    str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?(\.[a-z0-9]([-a-z0-9]*[a-z0-9])?)*$", max_length=253)
]
"""Name of an object of the cluster: lower-case letters, digits, '-' and '.'."""


def _shallow(value: Any) -> Any:
    """Refuses what neither JSON decoders nor people can follow."""
    for number, part in enumerate(value if isinstance(value, list) else [value]):
        if too_deep(part):
            where = f"entry {number} is" if isinstance(value, list) else "it is"
            raise ValueError(f"{where} nested more than {names.MAX_NESTING} levels deep; make it flatter")
    return value


class DatasetSpec(Section):
    """Where the rows come from. Exactly one of name, inline, path."""

    name: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Name of a data set on the hub, for example nvidia/HelpSteer2."""
    inline: Annotated[list[dict[str, Any]], Field(min_length=1, max_length=10_000), AfterValidator(_shallow)] | None = (
        None
    )
    """Rows written into the job itself, at most 64 kB; each is a mapping of column to value. The Python client ships more as files."""
    path: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """.jsonl, .json, .parquet or .csv files: a path in the image, pvc://claim/path, bundle://name/file, or s3://, gs://, az:// with a file, a folder or a pattern (part-*.parquet); https:// for one file."""
    split: Annotated[str, Field(min_length=1, max_length=200)] = "train"
    """Split of a hub data set, as in datasets.load_dataset (slices like train[:1000] work). Default train."""
    subset: Annotated[str, Field(min_length=1, max_length=200)] | None = None
    """Configuration name of a hub data set (second argument of load_dataset). Default none."""
    data_dir: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Folder within a hub data set, for example preference for nvidia/HelpSteer2. Default none."""
    streaming: bool | None = None
    """Read a hub data set as a stream, taking only the rows that the run needs. Default: only for sets known to be huge."""
    max_rows: Annotated[int, Field(ge=1)] | None = None
    """Use at most this many rows. Default all."""

    @model_validator(mode="after")
    def _exactly_one(self) -> DatasetSpec:
        given = [f for f in ("name", "inline", "path") if getattr(self, f) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none of them'}; give exactly one of name, inline, path")
        return self


class RewardSpec(Section):
    """The reward of a GRPO job. Exactly one of function, source, bundle, builtin."""

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", max_length=500)] | None = None
    """Importable callable as package.module:name, present in the image."""
    source: Annotated[str, Field(min_length=1, max_length=names.MAX_INLINE_SOURCE)] | None = None
    """Inline Python source that defines the entrypoint. At most 64 kB."""
    bundle: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """Name of the entry in bundles that holds the code; put there by the Python client."""
    builtin: Literal["exact_match", "math_answer", "format", "length"] | None = None
    """A reward that ships with nemo-rl; exact_match and math_answer read the column answer (or expected_answer, ground_truth)."""
    entrypoint: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.:]*$", max_length=200)] | None = None
    """Name to call within source or bundle. Default reward."""
    weights: Annotated[list[float], Field(max_length=32)] | None = None
    """Weight of each reward where the entrypoint is a list of several. Default 1 each."""
    workers: Annotated[int, Field(ge=1, le=256)] = 1
    """Processes that call the reward at the same time, in each process that trains. Default 1."""
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = 60.0
    """Seconds after which one call of the reward counts as failed. Default 60."""
    on_error: Literal["raise", "zero", "drop"] = "raise"
    """What a reward that raises, hangs or returns no finite number does: raise ends the job, zero scores 0, drop leaves the completion out. Default raise."""

    @model_validator(mode="after")
    def _exactly_one(self) -> RewardSpec:
        given = [f for f in ("function", "source", "bundle", "builtin") if getattr(self, f) is not None]
        if len(given) != 1:
            raise ValueError(
                f"found {' and '.join(given) or 'none of them'}; give exactly one of function, source, bundle, builtin"
            )
        if self.entrypoint and not (self.source or self.bundle):
            raise ValueError("entrypoint belongs to source or bundle; a function carries its own name after the colon")
        return self


class CallbackSpec(Section):
    """A callback that runs beside the trainer. Exactly one of function, bundle."""

    function: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$", max_length=500)] | None = None
    """Importable class or factory as package.module:name, present in the image."""
    bundle: Annotated[str, Field(min_length=1, max_length=63)] | None = None
    """Name of the entry in bundles that holds the code."""
    entrypoint: Annotated[str, Field(pattern=r"^[A-Za-z_][\w.:]*$", max_length=200)] | None = None
    """Name to use within the bundle. Default callback."""

    @model_validator(mode="after")
    def _exactly_one(self) -> CallbackSpec:
        given = [f for f in ("function", "bundle") if getattr(self, f) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none of them'}; give exactly one of function, bundle")
        return self


class BundleSpec(Section):
    """Files shipped by the client: a tar.gz cut over immutable ConfigMaps or, where it is large, in the output's store."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=63)]
    """Name by which reward, callbacks, dataset and model refer to it."""
    sha256: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    """SHA-256 of the whole archive; the pod checks it before it unpacks."""
    config_maps: Annotated[list[ObjectName], Field(max_length=32)] = []
    """Names of the ConfigMaps that hold the parts, in order. Default none: the archive is below output.uri, as .bundles/SHA256.tar.gz."""
    python: Annotated[str, Field(pattern=r"^3\.\d+$")] | None = None
    """Python minor version that the bundle needs; only where it holds pickles."""


def _resume(value: Any) -> Any:
    """Python says True and False where YAML says required and never."""
    return {True: "required", False: "never"}.get(value, value) if isinstance(value, bool) else value


def _names(value: Any) -> Any:
    """One name is a list of one, and none a list of none."""
    return [] if value in (None, "none") else [value] if isinstance(value, str) else value


class TrainingSpec(Section):
    """What all algorithms share: length, optimizer, batches, checkpoints, logging."""

    max_steps: Annotated[int, Field(ge=1)] = 1000
    """Optimizer steps after which training ends. Default 1000."""
    max_epochs: Annotated[int, Field(ge=1)] = 1
    """Passes over the data after which training ends, if max_steps is not reached before. Default 1."""
    learning_rate: Annotated[float, Field(gt=0, le=10)] | None = None
    """Peak learning rate of AdamW. Default 1e-6 for grpo, 2e-5 for sft, 5e-7 for dpo; with lora_rank 1e-5, 1e-4 and 1e-5."""
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Rows per optimizer step: prompts (GRPO), examples (SFT) or pairs (DPO). Default 32."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 42
    """Seed of every random draw; equal seeds give equal runs. Default 42."""
    shuffle: bool = True
    """Draw the rows in a new random order each epoch. Default true."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "constant"
    """Learning rate after the warm-up: constant, or decay to zero at the last step. Default constant."""
    warmup_steps: Annotated[int, Field(ge=0)] | None = None
    """Steps over which the learning rate rises from zero. Default 5 % of the steps, at most 50."""
    weight_decay: Annotated[float, Field(ge=0, le=10)] = 0.01
    """AdamW weight decay of matrices; biases and norms have none. Default 0.01."""
    adam_beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of AdamW's first moment. Default 0.9."""
    adam_beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of AdamW's second moment. Default 0.999."""
    adam_epsilon: Annotated[float, Field(gt=0, le=1)] = 1e-8
    """AdamW's epsilon. Default 1e-8."""
    max_grad_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this norm; null clips nothing. Default 1."""
    tokens_per_microbatch: Annotated[int, Field(ge=1)] | None = None
    """Tokens of one forward and backward pass; never changes the gradient, only memory and speed. Default: what fits a GPU by the estimate of nemo-rl plan, at most 16384; 4096 on the CPU."""
    max_sequence_length: Annotated[int, Field(ge=2)] = 2048
    """Longest prompt plus completion, in tokens. Default 2048."""
    overlong_rows: Literal["drop", "truncate", "error"] = "drop"
    """What happens to rows over max_sequence_length: drop them, cut their end (of GRPO prompts the beginning), or stop. Counted and logged. Default drop."""
    activation_checkpointing: bool | None = None
    """Recompute activations in the backward pass: less memory, about a quarter slower. Default: on a GPU where the estimate of nemo-rl plan says that the run would not fit without; false on the CPU."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Arithmetic of forward and backward; weights and optimizer stay fp32. auto is bf16 on CUDA, fp32 on CPU. Default auto."""
    cast_lm_head_to_fp32: bool = False
    """Compute logits in float32 where the rest is bf16 (arXiv 2506.13585): log-probabilities closer to those of rollouts, for more time and memory in the output layer. Default false."""
    sharding: Literal["auto", "full", "none"] = "auto"
    """full: each rank keeps a part of the weights, gradients and optimizer, and blocks are made whole as passes come to them (FSDP2); none: each rank keeps them whole. auto is full on more than one rank. Default auto."""
    lora_rank: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Train low-rank adapters of this rank instead of all weights (needs the extra lora). Default none: full training."""
    lora_alpha: Annotated[float, Field(gt=0)] | None = None
    """Scale of the adapters. Default twice lora_rank."""
    lora_target_modules: Annotated[list[str], Field(min_length=1, max_length=64)] | None = None
    """Names of the modules that get adapters. Default all linear layers."""
    save_every: Annotated[int, Field(ge=1)] | None = 100
    """Steps between checkpoints; null saves only at the end. Default 100."""
    keep_checkpoints: Annotated[int, Field(ge=1)] = 2
    """Newest checkpoints to keep; the best one is always kept besides. Default 2."""
    checkpoint_dtype: Literal["auto", "fp32"] = "auto"
    """Precision of the weights in checkpoints. auto is that of the model as it was loaded (a bf16 model stays one); the fp32 weights of training are kept beside for resume. Default auto."""
    eval_every: Annotated[int, Field(ge=1)] | None = None
    """Steps between evaluations of the validation data. Default: at every checkpoint and at the end."""
    resume: Annotated[Literal["auto", "required", "never"], BeforeValidator(_resume)] = "auto"
    """auto continues the run of the same settings if there is one that is not finished or shorter, required fails if there is none, never begins another one beside. In Python also True and False. Default auto."""
    logged_completions: Annotated[int, Field(ge=0)] = 2
    """Sample completions with their rewards that each GRPO step writes to completions.jsonl. Default 2."""
    tensorboard: bool = False
    """Write TensorBoard event files beside metrics.jsonl. Default false."""
    report_to: Annotated[
        list[Literal["tensorboard", "wandb", "mlflow", "trackio"]], Field(max_length=4), BeforeValidator(_names)
    ] = []
    """Where metrics and settings go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, or several (each an extra). Their own variables say where to and as whom, such as WANDB_MODE=offline. Default nowhere."""
    log_level: Annotated[
        Literal["debug", "info", "warning", "error"],
        BeforeValidator(lambda v: v.lower() if isinstance(v, str) else v),
    ] = "info"
    """Least severe level that is printed. Default info."""
    log_every: Annotated[int, Field(ge=1)] = 1
    """Steps between printed lines of metrics, where no panel shows them. The first and the last step and those that evaluate are always printed; metrics.jsonl and the log of a pod have every step. Default 1."""
    chat_template: Annotated[str, Field(min_length=1, max_length=names.MAX_INLINE_SOURCE)] | None = None
    """Jinja text of a chat template, in place of the tokenizer's own; saved with the checkpoints. Default the tokenizer's."""
    chat_template_kwargs: Annotated[dict[str, Any], Field(max_length=64)] = {}
    """Values that the chat template asks for by name, for example enable_thinking. Default none."""
    trust_remote_code: bool = False
    """Run model code that comes with the checkpoint. Default false."""

    @model_validator(mode="after")
    def _adapters_have_a_rank(self, info: ValidationInfo) -> TrainingSpec:
        alone = [f for f in ("lora_alpha", "lora_target_modules") if getattr(self, f) is not None]
        if alone and self.lora_rank is None and not (info.context or {}).get("reading"):
            raise ValueError(
                f"found {alone[0]} without lora_rank, which would train all weights and no adapter; give lora_rank (16 is "
                f"usual) to train adapters, or remove {alone[0]}"
            )
        return self


class GRPOSpec(Section):
    """Group relative policy optimisation: rollouts, advantages and the clipped loss."""

    num_generations_per_prompt: Annotated[int, Field(ge=2, le=4096)] = 16
    """Completions sampled for each prompt; they form one group. Default 16."""
    normalize_rewards: bool = True
    """Divide advantages by the spread of the group. Default true."""
    use_leave_one_out_baseline: bool = True
    """Compare each reward with the mean of the others of its group, rather than of all. Default true."""
    advantage_statistics: Literal["leave_one_out", "leave_one_out_mean", "group"] | None = None
    """Whose mean and deviation a reward is compared with: leave_one_out both of the others of its group, leave_one_out_mean the mean of the others and the deviation of all, group both of all (GRPO as published). Default leave_one_out, or group where use_leave_one_out_baseline is false."""
    dynamic_sampling_rounds: Annotated[int, Field(ge=0, le=100)] = 0
    """Further rounds of rollouts of a step, in which other rows take the places of those whose completions all have the same reward, since these teach nothing (DAPO). Default 0."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 512
    """Longest completion, in tokens. Default 512."""
    temperature: Annotated[float, Field(gt=0, le=100)] = 1.0
    """Sampling temperature; the loss uses the same. Default 1."""
    top_k: Annotated[int, Field(ge=1)] | None = None
    """Sample only among the k likeliest tokens. Default all."""
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Sample only among the likeliest tokens that together have this probability. Default 1."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"] = "dapo"
    """How token losses are averaged: dapo over all tokens of the batch, grpo first within each completion, dr_grpo by the constant max_new_tokens. gspo clips one ratio for each completion (its clips are small: 0.0003 and 0.0004), cispo clips the weight of a token and keeps its gradient. Default dapo."""
    clip_low: Annotated[float, Field(ge=0, le=1)] = 0.2
    """The probability ratio is clipped below at 1 - clip_low; 1 is no bound. Default 0.2."""
    clip_high: Annotated[float, Field(ge=0)] = 0.2
    """The probability ratio is clipped above at 1 + clip_high; DAPO uses 0.28. Default 0.2."""
    dual_clip: Annotated[float, Field(gt=1)] | None = None
    """Bound of the loss of tokens with negative advantage, times the advantage; 3 is usual. Default none."""
    num_iterations: Annotated[int, Field(ge=1, le=100)] = 1
    """Optimizer updates from each batch of rollouts; with mini_batch_size passes over it. Default 1."""
    mini_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Prompts of one optimizer update: a batch of rollouts is cut into mini-batches, in the order of its rows, with one update for each. Default the whole batch."""
    importance_correction: Literal[
        "auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
    ] = "auto"
    """Weighs tokens by their probability in training over that in sampling: truncate bounds this ratio, mask leaves out what is beyond the bounds, each for tokens or for whole completions. auto: token_truncate for rollouts of another engine or of older weights, none for the trainer's own. Default auto."""
    importance_max: Annotated[float, Field(gt=0)] | None = 2.0
    """Upper bound of that ratio; null is none. Default 2."""
    importance_min: Annotated[float, Field(ge=0)] | None = None
    """Lower bound of that ratio. Default none."""
    beta: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the KL divergence to the reference model; 0 loads no reference. Default 0."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """Estimator of that divergence (Schulman). Default k3."""
    use_kl_in_reward: bool = False
    """Subtract beta times the divergence from the rewards, rather than adding it to the loss; k1 is its usual estimator. Default false."""
    stop: Annotated[list[Annotated[str, Field(min_length=1, max_length=200)]], Field(max_length=32)] = []
    """Texts that end a completion, which keeps them; the name of a token is that token. Default none but the model's end tokens."""
    stop_token_ids: Annotated[list[Annotated[int, Field(ge=0)]], Field(max_length=32)] = []
    """Ids of further tokens that end a completion. Default none but the model's end tokens."""
    mask_truncated_completions: bool = False
    """Leave completions that ran into max_new_tokens out of the loss. Default false."""

    @model_validator(mode="after")
    def _fit_together(self) -> GRPOSpec:
        if self.loss_type == "cispo" and self.dual_clip is not None:
            raise ValueError(
                "found dual_clip with loss_type cispo, which has no such bound; leave dual_clip out or take another loss_type"
            )
        says = "leave_one_out" if self.use_leave_one_out_baseline else "group"
        if "use_leave_one_out_baseline" in self.model_fields_set and self.statistics.split("_mean")[0] != says:
            raise ValueError(
                f"found use_leave_one_out_baseline {str(self.use_leave_one_out_baseline).lower()} and advantage_statistics "
                f"{self.statistics}, which contradict each other; give advantage_statistics alone"
            )
        low, high = self.importance_min, self.importance_max
        if low is not None and high is not None and low > high:
            raise ValueError(f"found importance_min {low:g} above importance_max {high:g}; expected bounds in order")
        if self.use_kl_in_reward and self.beta == 0:
            raise ValueError(
                "found use_kl_in_reward with beta 0, so there is no divergence to subtract; set beta above 0"
            )
        return self

    @property
    def statistics(self) -> Literal["leave_one_out", "leave_one_out_mean", "group"]:
        """What `advantage_statistics` says, or means where it is not given."""
        return self.advantage_statistics or ("leave_one_out" if self.use_leave_one_out_baseline else "group")


Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti|P|Pi)?$", max_length=20)]

MAX_REPLICAS = 64


class ReplicaResourcesSpec(Section):
    """What each rollout replica asks of the cluster, beside its GPUs."""

    cpu: Quantity | None = None
    """CPUs of each replica, request and limit alike. Default none asked."""
    memory: Quantity | None = None
    """Memory of each replica, request and limit alike. Default: 1Gi is asked for, without a limit."""
    ephemeral_storage: Quantity | None = None
    """Disk of each replica's node, which holds one version of the weights at a time, request and limit alike. Default: 1Gi is asked for, without a limit."""
    shared_memory: Quantity = "1Gi"
    """Size of /dev/shm. Default 1Gi."""


class RolloutSpec(Section):
    """What samples the completions of GRPO: the processes that train, or vLLM servers that get each version of the weights."""

    engine: Literal["in_process", "vllm"] = "in_process"
    """in_process samples in the processes that train; vllm asks servers, which are far faster on GPUs. Default in_process."""
    python: Annotated[str, Field(min_length=1, max_length=1000)] | None = None
    """Python interpreter that has vLLM 0.30 to 0.33: a server is started with it beside the trainer and ends with the run. vLLM needs another torch, so it is never the trainer's own interpreter."""
    urls: Annotated[
        list[Annotated[str, Field(pattern=r"^https?://[^\s/?#]+(/[^\s?#]*)?$", max_length=500)]], Field(max_length=64)
    ] = []
    """Addresses of servers that somebody else runs by nemo_rl.rollout.vllm.serve; the environment variable NEMO_RL_ROLLOUT_TOKEN holds their token. Default none."""
    replicas: Annotated[int, Field(ge=1, le=MAX_REPLICAS)] | None = None
    """Rollout pods that the operator runs for this job, each with a vLLM server. May change while the job runs: kubectl scale rlj/NAME --replicas=4. They take the job's placement (nodeSelector, tolerations, …), and none of its env. Default none."""
    gpus_per_replica: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs of each replica (resources.gpuResource), over which its model is split; 0 samples on the CPU. Default 1."""
    resources: ReplicaResourcesSpec = ReplicaResourcesSpec()
    """What each replica asks of the cluster, beside its GPUs."""
    image: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Image of the replicas. Default: the one the operator was installed with."""
    weight_transfer: Literal["auto", "http", "files", "adapter"] = "auto"
    """How servers get weights: they pull them from the trainer (http), read them in a folder that both see (files), or get the LoRA adapter alone (adapter). auto takes the adapter where there is one, files beside the trainer, else http. Default auto."""
    mismatch_limit: Annotated[float, Field(gt=0, le=10)] | None = None
    """Mean difference of log-probabilities, in nats a token, between a server and the trainer, beyond which a server is refused. Default 0.001 in fp32, 0.1 in bf16."""
    gpu_memory_fraction: Annotated[float, Field(gt=0, le=1)] = 0.85
    """Share of a GPU's memory that a server started beside the trainer takes. Default 0.85."""
    sleep: bool = False
    """Whether a server started beside the trainer gives its GPU's memory back while the model trains, by vLLM's sleep mode. Default false."""
    max_model_length: Annotated[int, Field(ge=8)] | None = None
    """Longest prompt plus completion that such a server takes, in tokens. Default what the data and max_new_tokens need."""
    timeout_seconds: Annotated[float, Field(gt=0, le=86400)] = 600.0
    """Seconds that the run waits for a ready server before it fails, also at the start. Default 600."""
    max_staleness: Annotated[int, Field(ge=0, le=64)] = 0
    """Optimizer steps by which the weights that sample may be older than those that are trained: rollouts of so many further steps run ahead, with their rewards, while the model trains. 0 is on policy. Default 0."""

    @model_validator(mode="after")
    def _one_place(self) -> RolloutSpec:
        places = [f for f in ("python", "urls", "replicas") if getattr(self, f)]
        if self.engine == "in_process":
            if places:
                raise ValueError(f"{places[0]} belongs to engine vllm, but engine is in_process; set engine to vllm")
        elif len(places) != 1:
            found = f"{len(places)} of them ({', '.join(places)})" if places else "none of them"
            raise ValueError(
                "engine vllm needs python, an interpreter that has vLLM, urls of servers, or replicas, a number of pods on a "
                f"cluster; found {found}; give one of them"
            )
        if self.sleep and self.python is None:
            raise ValueError(
                "sleep belongs to python, a server beside the trainer: others have GPUs of their own; leave it out"
            )
        if self.sleep and self.max_staleness:
            raise ValueError(
                f"found sleep with max_staleness {self.max_staleness}, by which the server samples while the model trains; give "
                "one of them"
            )
        if self.replicas is None:
            given = [name for name in _OF_REPLICAS if getattr(self, name) != type(self).model_fields[name].default]
            if given:
                raise ValueError(f"{given[0]} belongs to replicas, which is not given; give replicas, or leave it out")
        elif self.weight_transfer == "files":
            raise ValueError(
                "found weight_transfer files with replicas, which share no folder with the trainer; use http, or leave "
                "weight_transfer out"
            )
        return self


_OF_REPLICAS = ("gpus_per_replica", "resources", "image")


class BudgetSpec(Section):
    """What a job may use up over all of its attempts; once that is spent, it is suspended."""

    gpu_hours: Annotated[float, Field(gt=0, le=1e9)]
    """GPU hours of trainers and replicas: each pod's GPUs (gpusPerNode, gpusPerReplica) from when it has a node until it ends. When they are spent the job saves and frees its pods; raise them, or set budget to null, and it goes on from the checkpoint. May change at any time."""


class DPOSpec(Section):
    """Direct preference optimisation."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """Strength of the tie to the reference model. Default 0.1."""
    preference_loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """Loss of a pair's margin. Default sigmoid."""
    label_smoothing: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Share of pairs assumed to be labelled the wrong way round (sigmoid only). Default 0."""
    nll_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the chosen completions' negative log-likelihood per token, added to the loss. Default 0."""


class SFTSpec(Section):
    """Supervised fine-tuning."""

    train_on_prompt: bool = False
    """Train on the prompt's tokens too, not only on completions and assistant turns. Default false."""


def _store(value: str) -> str:
    if (wrong := uris.problem(value)) is not None:
        raise ValueError(wrong)
    return value.rstrip("/")


HUB_REPOSITORY = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}/[A-Za-z0-9][A-Za-z0-9._-]{0,63}$"
"""Owner and name of a repository on the hub."""


class OutputSpec(Section):
    """Where checkpoints and metrics are kept on the cluster."""

    uri: Annotated[str, Field(min_length=8, max_length=uris.MAX_LENGTH), AfterValidator(_store)] | None = None
    """Object store in place of a claim: s3://bucket/folder, gs://… or az://…; the job writes to the folder with its name below. Credentials come from env, envFrom or the service account. Default none."""
    claim: ObjectName | None = None
    """Existing PersistentVolumeClaim to write to. Default: one is made for the job."""
    size: Quantity = "20Gi"
    """Size of the claim that is made. Default 20Gi."""
    storage_class_name: ObjectName | None = None
    """StorageClass of that claim. Default: the cluster's default."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"] | None = None
    """Access mode of that claim. Default ReadWriteOnce for one node, ReadWriteMany for several."""
    retain: bool = True
    """Keep the claim when the job is deleted. Default true."""
    serve_until: Annotated[str, Field(json_schema_extra={"format": "date-time"}, max_length=40)] | None = None
    """While this time (RFC 3339) is in the future, a pod serves the output for download. Default: not served."""
    hub: Annotated[str, Field(pattern=HUB_REPOSITORY, max_length=96)] | None = None
    """Repository of the Hugging Face hub, owner/name, to which the best checkpoint is uploaded at the end. The token with the right to write is the environment variable HF_TOKEN, which comes from a Secret; the run is refused at its start without it. Default: nothing is uploaded."""
    hub_private: bool = True
    """Whether that repository is private where it is made by this run. Default true."""

    @model_validator(mode="after")
    def _claim_or_store(self) -> OutputSpec:
        given = [f for f in ("claim", "storage_class_name", "access_mode") if getattr(self, f) is not None]
        if self.uri is not None and given:
            fields = ", ".join(to_camel(f) for f in given)
            raise ValueError(f"uri takes the place of a claim, so {fields} would have no effect; give either")
        return self


class CacheSpec(Section):
    """A claim for hub downloads, shared by attempts and jobs."""

    claim: ObjectName | None = None
    """Existing PersistentVolumeClaim, mounted at /cache. Default: an emptyDir of the pod."""


RESOURCE_NAME = r"^[a-z0-9]([-a-z0-9.]*[a-z0-9])?/[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$"
"""Names of extended resources: what a device plugin offers."""
CORE_RESOURCES = "kubernetes.io/"
"""What no name of an extended resource contains."""


def _resource_name(value: str) -> str:
    if not re.fullmatch(RESOURCE_NAME, value) or len(value) > 253 or CORE_RESOURCES in value:
        raise ValueError(
            f"{value!r} is no name of an extended resource; expected one as the device plugin gives it, with its domain "
            "(rdma/hca, nvidia.com/mig-3g.40gb), and none of kubernetes.io"
        )
    return value


def _resource_names(value: dict[str, int]) -> dict[str, int]:
    for name in value:
        _resource_name(name)
    return value


DEFAULT_REQUESTS = {"memory": "1Gi", "ephemeral-storage": "1Gi"}
"""What a pod asks for where the job does not say: without any request it is the first to be evicted from a full node."""


class DeviceClaim(Section):
    """Devices by dynamic resource allocation (DRA): each pod gets a ResourceClaim of its own, made from a template."""

    template: ObjectName
    """Name of a ResourceClaimTemplate in the job's namespace."""
    gpus: bool = False
    """Its devices are the GPUs that gpusPerNode counts, in place of gpuResource. Default false."""


class ResourcesSpec(Section):
    """What each pod asks of the cluster."""

    nodes: Annotated[int, Field(ge=1, le=1024)] = 1
    """Pods that train together. Default 1."""
    gpus_per_node: Annotated[int, Field(ge=0, le=64)] = 1
    """GPUs of each pod (nvidia.com/gpu, or gpuResource); 0 trains on the CPU. Default 1."""
    gpu_resource: Annotated[
        str, Field(pattern=RESOURCE_NAME, min_length=3, max_length=253), AfterValidator(_resource_name)
    ] = "nvidia.com/gpu"
    """What gpusPerNode counts, by the name that the device plugin gives it: amd.com/gpu, nvidia.com/mig-3g.40gb. Default nvidia.com/gpu."""
    extra: Annotated[
        dict[str, Annotated[int, Field(ge=1, le=1_000_000)]], Field(max_length=16), AfterValidator(_resource_names)
    ] = {}
    """Further extended resources of each pod, by name, request and limit alike: {"rdma/hca": 1}. Default none."""
    claims: Annotated[list[DeviceClaim], Field(max_length=8)] = []
    """Devices of each pod by dynamic resource allocation, each from a ResourceClaimTemplate. Default none."""
    cpu: Quantity | None = None
    """CPUs of each pod, request and limit alike. Default none asked."""
    memory: Quantity | None = None
    """Memory of each pod, request and limit alike. Default: 1Gi is asked for, without a limit."""
    ephemeral_storage: Quantity | None = None
    """Disk of each pod's node for what is no volume (downloads, scratch), request and limit alike. Default: 1Gi is asked for, without a limit."""
    shared_memory: Quantity = "1Gi"
    """Size of /dev/shm. Default 1Gi."""

    @model_validator(mode="after")
    def _devices_once(self) -> ResourcesSpec:
        if self.gpu_resource in self.extra:
            raise ValueError(f"extra names {self.gpu_resource}, which gpusPerNode counts; give its number there alone")
        if "/mig-" in self.gpu_resource and self.gpus_per_node > 1:
            raise ValueError(
                f"gpusPerNode is {self.gpus_per_node} of {self.gpu_resource}, but a process sees one MIG slice only; give 1, "
                "and more nodes"
            )
        if len({claim.template for claim in self.claims}) < len(self.claims):
            raise ValueError("claims name a template twice; name each once, and ask for more devices in the template")
        if self.gpus_are_claimed and not self.gpus_per_node:
            raise ValueError("claims give GPUs (gpus: true), but gpusPerNode is 0; give the number that each pod gets")
        return self

    @property
    def gpus_are_claimed(self) -> bool:
        """Whether the GPUs come by a claim, and not by gpuResource."""
        return any(claim.gpus for claim in self.claims)


class SecretKeyRef(Section):
    """One key of a Secret in the job's namespace."""

    name: ObjectName
    """Name of the Secret."""
    key: Annotated[str, Field(pattern=r"^[-._a-zA-Z0-9]+$", max_length=253)]
    """Key within the Secret."""
    optional: bool = False
    """Start even if it does not exist. Default false."""


class EnvSource(Section):
    """Where the value of an environment variable comes from."""

    secret_key_ref: SecretKeyRef
    """One key of a Secret."""


class EnvVar(Section):
    """An environment variable of the trainer: a literal value, or one key of a Secret."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_.-]*$", max_length=200)]
    """Name of the variable."""
    value: Annotated[str, Field(max_length=4096)] | None = None
    """Literal value; never a secret."""
    value_from: EnvSource | None = None
    """Reference to a Secret."""

    @model_validator(mode="after")
    def _one_source(self) -> EnvVar:
        if (self.value is None) == (self.value_from is None):
            raise ValueError(f"environment variable {self.name}: give exactly one of value, valueFrom")
        return self


class LocalReference(Section):
    """A Secret of the job's namespace, by name."""

    name: ObjectName
    """Name of the Secret."""


class EnvFrom(Section):
    """All keys of a Secret as environment variables."""

    secret_ref: LocalReference
    """The Secret."""


class Toleration(Section):
    """A taint that the pods tolerate, as in the core API."""

    key: Annotated[str, Field(max_length=317)] | None = None
    """Key of the taint; empty matches all with operator Exists."""
    operator: Literal["Exists", "Equal"] = "Equal"
    """How value is compared. Default Equal."""
    value: Annotated[str, Field(max_length=63)] | None = None
    """Value of the taint."""
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """Effect that is tolerated. Default all."""
    toleration_seconds: Annotated[int, Field(ge=0)] | None = None
    """Seconds that a NoExecute taint is tolerated. Default for ever."""


class TopologySpread(Section):
    """How evenly the pods of an attempt are spread, as in the core API; only the job's own pods are counted."""

    topology_key: Annotated[str, Field(min_length=1, max_length=317)]
    """Label of nodes; those with the same value are one place: kubernetes.io/hostname, topology.kubernetes.io/zone."""
    max_skew: Annotated[int, Field(ge=1, le=1024)] = 1
    """By how many pods two places may differ. Default 1."""
    when_unsatisfiable: Literal["DoNotSchedule", "ScheduleAnyway"] = "DoNotSchedule"
    """What becomes of a pod that would make them differ more: it waits, or it is only the last choice. Default DoNotSchedule."""
    min_domains: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Places that there must be at least, with DoNotSchedule. Default 1."""

    @model_validator(mode="after")
    def _domains_are_required(self) -> TopologySpread:
        if self.min_domains is not None and self.when_unsatisfiable != "DoNotSchedule":
            raise ValueError("minDomains belongs to whenUnsatisfiable DoNotSchedule; remove one of them")
        return self


class ConfigMapVolume(Section):
    """The keys of a ConfigMap as files, read-only."""

    name: ObjectName
    """Name of the ConfigMap."""


class SecretVolume(Section):
    """The keys of a Secret as files, read-only."""

    secret_name: ObjectName
    """Name of the Secret."""


class ClaimVolume(Section):
    """An existing PersistentVolumeClaim."""

    claim_name: ObjectName
    """Name of the claim."""
    read_only: bool = True
    """Mount it read-only. Default true."""


class EmptyDirVolume(Section):
    """An empty folder that lives as long as the pod."""

    medium: Literal["", "Memory"] = ""
    """Empty for the node's disk; Memory for its memory, which then counts as the pod's. Default empty."""
    size_limit: Quantity | None = None
    """Size at which the pod is evicted. Default no limit of its own."""


class ImageVolume(Section):
    """The files of an OCI image or artifact, read-only; needs nodes and a cluster that have image volumes."""

    reference: Annotated[str, Field(min_length=1, max_length=500)]
    """Name of the image with its tag or digest; pulled with imagePullSecrets."""
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = "IfNotPresent"
    """When it is pulled. Default IfNotPresent."""


VOLUME_KINDS = ("config_map", "secret", "persistent_volume_claim", "empty_dir", "image")
MOUNT_PATH = r"^(/[A-Za-z0-9._-]*[A-Za-z0-9_-][A-Za-z0-9._-]*)+$"
"""Absolute, without empty parts, '.' and '..', and without a slash at its end."""
TAKEN_PATHS = (
    *(names.OUTPUT_DIR, names.CACHE_DIR, names.HOME_DIR, names.JOB_DIR, names.POD_DIR, "/tmp"),
    *("/dev", "/proc", "/sys"),
)
"""What a volume of a job may neither be at, nor below, nor above: the pod has its own there."""


class VolumeSpec(Section):
    """A further volume of the trainer pods, as in the core API. Exactly one of configMap, secret, persistentVolumeClaim, emptyDir, image."""

    name: Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=50)]
    """Name of the volume: lower-case letters, digits and '-'."""
    mount_path: Annotated[str, Field(pattern=MOUNT_PATH, max_length=500)] | None = None
    """Folder at which it is mounted. Default /volumes/ and its name."""
    config_map: ConfigMapVolume | None = None
    """A ConfigMap of the job's namespace."""
    secret: SecretVolume | None = None
    """A Secret of the job's namespace."""
    persistent_volume_claim: ClaimVolume | None = None
    """A claim of the job's namespace."""
    empty_dir: EmptyDirVolume | None = None
    """An empty folder."""
    image: ImageVolume | None = None
    """An image."""

    @model_validator(mode="after")
    def _one_kind_at_a_free_place(self) -> VolumeSpec:
        kinds = ", ".join(map(to_camel, VOLUME_KINDS))
        given = [to_camel(kind) for kind in VOLUME_KINDS if getattr(self, kind) is not None]
        if len(given) != 1:
            raise ValueError(f"found {' and '.join(given) or 'none of them'}; give exactly one of {kinds}")
        for taken in TAKEN_PATHS:
            if overlap(self.path, taken):
                raise ValueError(
                    f"mountPath {self.path} is in the way of {taken}, where the pod has its own; mount it elsewhere"
                )
        return self

    @property
    def path(self) -> str:
        """Where it is mounted."""
        return self.mount_path or f"/volumes/{self.name}"

    @property
    def read_only(self) -> bool:
        """Whether nothing can be written there."""
        return self.empty_dir is None and (
            self.persistent_volume_claim is None or self.persistent_volume_claim.read_only
        )


def overlap(one: str, other: str) -> bool:
    """Whether two folders are the same, or one is within the other."""
    return f"{one}/".startswith(f"{other}/") or f"{other}/".startswith(f"{one}/")


Labels = Annotated[dict[str, Annotated[str, Field(max_length=63)]], Field(max_length=64)]
Annotations = Annotated[dict[str, Annotated[str, Field(max_length=4096)]], Field(max_length=64)]


class RLTrainingJobSpec(Section):
    """One post-training run: what to train, on which data, by which algorithm, with which resources."""

    model: Annotated[str, Field(min_length=1, max_length=500)]
    """Hub name, path in the image, pvc://claim/path, bundle://name, or s3://, gs://, az:// with a folder, a checkpoint or a run of ours."""
    algorithm: Algorithm = "grpo"
    """grpo (reinforcement learning from a reward), sft (supervised) or dpo (preferences). Default grpo."""
    dataset: DatasetSpec
    """The training rows."""
    validation_dataset: DatasetSpec | None = None
    """Rows that are only evaluated; decides which checkpoint is best. Default none."""
    reward: RewardSpec | None = None
    """The reward; required for grpo, refused otherwise."""
    callbacks: Annotated[list[CallbackSpec], Field(max_length=32)] = []
    """Callbacks that run beside the trainer. Default none."""
    bundles: Annotated[list[BundleSpec], Field(max_length=16)] = []
    """Files shipped by the Python client. Default none."""
    training: TrainingSpec = TrainingSpec()
    """What all algorithms share."""
    grpo: GRPOSpec | None = None
    """Settings of GRPO; refused with another algorithm. Default: the defaults of its fields."""
    rollout: RolloutSpec | None = None
    """What samples the completions of grpo; in Python a mapping such as {"engine": "vllm", "replicas": 2}. Default: the processes that train."""
    dpo: DPOSpec | None = None
    """Settings of DPO; refused with another algorithm. Default: the defaults of its fields."""
    sft: SFTSpec | None = None
    """Settings of SFT; refused with another algorithm. Default: the defaults of its fields."""
    output: OutputSpec = OutputSpec()
    """Where checkpoints and metrics are kept."""
    cache: CacheSpec = CacheSpec()
    """Where hub downloads are kept."""
    resources: ResourcesSpec = ResourcesSpec()
    """What each pod asks of the cluster."""
    image: Annotated[str, Field(min_length=1, max_length=500)] | None = None
    """Trainer image. Default: the one the operator was installed with."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None = None
    """When the image is pulled. Default IfNotPresent."""
    image_pull_secrets: Annotated[list[LocalReference], Field(max_length=16)] = []
    """Secrets for the image's registry. Default none."""
    service_account_name: ObjectName | None = None
    """Service account of the pods; its token is never mounted. Default: the namespace's default."""
    env: Annotated[list[EnvVar], Field(max_length=128)] = []
    """Environment variables of the trainer. Default none."""
    env_from: Annotated[list[EnvFrom], Field(max_length=16)] = []
    """Secrets whose keys become environment variables. Default none."""
    node_selector: Labels = {}
    """Labels that a node must have. Default none."""
    tolerations: Annotated[list[Toleration], Field(max_length=32)] = []
    """Taints that the pods tolerate. Default none."""
    affinity: Annotated[dict[str, Any], AfterValidator(_shallow)] | None = None
    """Affinity of the pods, as in the core API. Default none."""
    topology_spread_constraints: Annotated[list[TopologySpread], Field(max_length=8)] = []
    """How the pods are spread over nodes, racks or zones. Default by the cluster."""
    runtime_class_name: ObjectName | None = None
    """RuntimeClass of the trainer pods; some clusters need nvidia for GPUs. Default the nodes' own runtime."""
    volumes: Annotated[list[VolumeSpec], Field(max_length=16)] = []
    """Further volumes of the trainer pods, each with the place where it is mounted. Default none."""
    host_network: bool = False
    """The trainer pods use the network of their nodes, past the pod network and its policies. Default false."""
    capabilities: Annotated[list[Literal["IPC_LOCK"]], Field(max_length=1)] = []
    """Capabilities of the trainer's container. IPC_LOCK: programs of the image whose files carry it (setcap) may lock memory, as RDMA does. Default none."""
    priority_class_name: ObjectName | None = None
    """PriorityClass of the pods. Default none."""
    scheduler_name: ObjectName | None = None
    """Scheduler of the pods. Default the cluster's default scheduler."""
    labels: Labels = {}
    """Further labels of the pods. Default none."""
    annotations: Annotations = {}
    """Further annotations of the pods. Default none."""
    suspend: bool = False
    """true saves, stops and frees the pods; false goes on from the last checkpoint. Default false."""
    backoff_limit: Annotated[int, Field(ge=0, le=1000)] = 3
    """Failed attempts that are retried. Disruptions by others are retried without counting, as long as checkpoints come of it. Default 3."""
    active_deadline_seconds: Annotated[int, Field(ge=1)] | None = None
    """Seconds that the job may run in all: time in which pods run or start. No queue, no pause and no wait for a node counts. Default no limit."""
    budget: BudgetSpec | None = None
    """What the job may use up before it is suspended; {gpuHours: 100}, for example. Default no limit."""
    ttl_seconds_after_finished: Annotated[int, Field(ge=0)] | None = None
    """Seconds after its end that the job is deleted. Default never."""
    termination_grace_period_seconds: Annotated[int, Field(ge=1, le=86400)] = 120
    """Seconds that a pod has to save when it is stopped. Default 120."""
    startup_timeout_seconds: Annotated[int, Field(ge=1, le=604800)] = 3600
    """Seconds until all pods of an attempt run. Then the attempt gives its nodes back and is repeated; that never counts. Also the time that loading may take in silence. Default 3600."""
    stall_timeout_seconds: Annotated[int, Field(ge=10, le=604800)] = 1800
    """Seconds without any sign of progress (tokens, micro-batches, steps, checkpoints) after which an attempt counts as stuck, fails with the stacks of its processes, and is retried. Rewards get their own time besides. Default 1800."""
    on_node_lost: Literal["wait", "replace"] = "wait"
    """When a pod does not end because its node is silent: wait until somebody says that the pod is gone, or replace, which starts the next attempt; a write lease in the output keeps the lost pod from writing. Default wait."""

    @model_validator(mode="after")
    def _few_bundle_parts(self, info: ValidationInfo) -> RLTrainingJobSpec:
        parts = sum(len(bundle.config_maps) for bundle in self.bundles)
        if parts > names.MAX_BUNDLE_PARTS and not (info.context or {}).get("reading"):
            raise ValueError(
                f"bundles have {parts} parts together; at most {names.MAX_BUNDLE_PARTS} are allowed: put large data on "
                "a claim and name it as pvc://claim/path"
            )
        return self

    @model_validator(mode="after")
    def _volumes_apart(self) -> RLTrainingJobSpec:
        for number, volume in enumerate(self.volumes):
            for other in self.volumes[:number]:
                if volume.name == other.name:
                    raise ValueError(f"two volumes have the name {volume.name}; names must differ")
                if overlap(volume.path, other.path):
                    raise ValueError(
                        f"volumes {other.name} and {volume.name} are mounted at {other.path} and {volume.path}, one within the "
                        "other; mount them apart"
                    )
        return self

    @model_validator(mode="after")
    def _consistent(self) -> RLTrainingJobSpec:
        for section in ALGORITHMS:
            if section != self.algorithm and getattr(self, section) is not None:
                raise ValueError(
                    f"section {section} belongs to algorithm {section}, but algorithm is {self.algorithm}; remove it"
                )
        if self.algorithm == "grpo" and self.reward is None:
            raise ValueError("grpo needs a reward; give spec.reward")
        if self.algorithm != "grpo" and self.reward is not None:
            raise ValueError(f"{self.algorithm} uses no reward; remove spec.reward or choose algorithm grpo")
        if self.algorithm != "grpo" and self.rollout is not None:
            raise ValueError(f"{self.algorithm} samples nothing; remove spec.rollout or choose algorithm grpo")
        if (
            self.rollout is not None
            and self.rollout.max_staleness
            and (self.grpo or GRPOSpec()).dynamic_sampling_rounds
        ):
            raise ValueError(
                f"found rollout max_staleness={self.rollout.max_staleness} with dynamic_sampling_rounds="
                f"{(self.grpo or GRPOSpec()).dynamic_sampling_rounds}: further rounds sample while a step is made, and nothing "
                "can run ahead of them; leave one of the two out"
            )
        if self.rollout is not None and self.rollout.engine == "vllm":
            grpo = self.grpo or GRPOSpec()
            if (grpo.top_k is not None or grpo.top_p < 1) and grpo.temperature != 1:
                raise ValueError(
                    f"found rollout engine vllm with top_k or top_p and temperature {grpo.temperature:g}: vLLM then gives no "
                    "log-probabilities of the whole distribution; set temperature to 1, leave top_k and top_p out, or use "
                    "engine in_process"
                )
            if self.rollout.weight_transfer == "adapter" and self.training.lora_rank is None:
                raise ValueError(
                    "found rollout weight_transfer adapter, but no adapter is trained; set lora_rank, or leave weight_transfer out"
                )
        named = "://" in self.model and not self.model.startswith(("pvc://", "bundle://", "python:"))
        if named and (wrong := uris.problem(self.model)) is not None:
            raise ValueError(f"model: {wrong}")
        known = {bundle.name for bundle in self.bundles}
        if len(known) < len(self.bundles):
            raise ValueError("two bundles have the same name; names must differ")
        homeless = [bundle.name for bundle in self.bundles if not bundle.config_maps]
        if homeless and self.output.uri is None:
            raise ValueError(
                f"bundle {homeless[0]!r} has no configMaps; expected their names, or an output.uri in whose store its archive is"
            )
        for where, reference in self._bundle_references():
            if reference not in known:
                raise ValueError(
                    f"{where} names bundle {reference!r}, which is not among bundles: {sorted(known) or 'none'}"
                )
        return self

    def _bundle_references(self) -> list[tuple[str, str]]:
        found = [("reward", self.reward.bundle)] if self.reward and self.reward.bundle else []
        found += [(f"callbacks[{i}]", c.bundle) for i, c in enumerate(self.callbacks) if c.bundle]
        paths = {"model": self.model, "dataset": self.dataset.path}
        if self.validation_dataset:
            paths["validationDataset"] = self.validation_dataset.path
        for where, path in paths.items():
            if path and path.startswith("bundle://"):
                found.append((where, path.removeprefix("bundle://").split("/")[0]))
        return found

    @model_validator(mode="after")
    def _learning_rate_of_the_algorithm(self) -> RLTrainingJobSpec:
        """Fills in the learning rate where none was given; it does not count as given, so another algorithm has its own."""
        if "learning_rate" not in self.training.model_fields_set or self.training.learning_rate is None:
            training = self.training.model_copy()
            training.model_fields_set.discard("learning_rate")
            training.__dict__["learning_rate"] = LEARNING_RATES[self.algorithm][training.lora_rank is not None]
            self.__dict__["training"] = training
        return self

    def default_learning_rate_in_words(self) -> str | None:
        """A sentence about the learning rate where it was chosen for the caller and is not the one of GRPO, else None."""
        rate = self.training.learning_rate
        if "learning_rate" in self.training.model_fields_set or rate == LEARNING_RATES["grpo"][0]:
            return None
        what = f"{self.algorithm}{' with low-rank adapters' if self.training.lora_rank is not None else ''}"
        return f"learning_rate is not given: {rate:g}, the default of {what}"

    @property
    def settings(self) -> GRPOSpec | DPOSpec | SFTSpec:
        """The section of the chosen algorithm, with defaults where it is not given."""
        return getattr(self, self.algorithm) or SECTIONS[self.algorithm]()


SECTIONS: dict[Algorithm, type[GRPOSpec] | type[DPOSpec] | type[SFTSpec]] = {
    "grpo": GRPOSpec,
    "dpo": DPOSpec,
    "sft": SFTSpec,
}
