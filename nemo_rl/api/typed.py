"""Types of the keywords of `train()` and the trainers. Generated from the specification by docs/typed.py; do not edit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any, Literal, TypedDict


class Settings(TypedDict, total=False):
    """Settings that `train()` and the trainers take by name."""

    seed: int
    """Seed of every random draw; equal seeds give equal runs. Default 42."""
    shuffle: bool
    """Draw the rows in a new random order each epoch. Default true."""
    lr_schedule: Literal["constant", "linear", "cosine"]
    """Learning rate after the warm-up: constant, or decay to zero at the last step. Default constant."""
    warmup_steps: int | None
    """Steps over which the learning rate rises from zero. Default 5 % of the steps, at most 50."""
    weight_decay: float
    """AdamW weight decay of matrices; biases and norms have none. Default 0.01."""
    adam_beta1: float
    """Decay of AdamW's first moment. Default 0.9."""
    adam_beta2: float
    """Decay of AdamW's second moment. Default 0.999."""
    adam_epsilon: float
    """AdamW's epsilon. Default 1e-8."""
    max_grad_norm: float | None
    """Gradients are scaled down to this norm; null clips nothing. Default 1."""
    tokens_per_microbatch: int | None
    """Tokens of one forward and backward pass; never changes the gradient, only memory and speed. Default: what fits a GPU by the estimate of nemo-rl plan, at most 16384; 4096 on the CPU."""
    max_sequence_length: int
    """Longest prompt plus completion, in tokens. Default 2048."""
    overlong_rows: Literal["drop", "truncate", "error"]
    """What happens to rows over max_sequence_length: drop them, cut their end (of GRPO prompts the beginning), or stop. Counted and logged. Default drop."""
    activation_checkpointing: bool | None
    """Recompute activations in the backward pass: less memory, about a quarter slower. Default: on a GPU where the estimate of nemo-rl plan says that the run would not fit without; false on the CPU."""
    precision: Literal["auto", "fp32", "bf16"]
    """Arithmetic of forward and backward; weights and optimizer stay fp32. auto is bf16 on CUDA, fp32 on CPU. Default auto."""
    cast_lm_head_to_fp32: bool
    """Compute logits in float32 where the rest is bf16 (arXiv 2506.13585): log-probabilities closer to those of rollouts, for more time and memory in the output layer. Default false."""
    sharding: Literal["auto", "full", "none"]
    """full: each rank keeps a part of the weights, gradients and optimizer, and blocks are made whole as passes come to them (FSDP2); none: each rank keeps them whole. auto is full on more than one rank. Default auto."""
    lora_rank: int | None
    """Train low-rank adapters of this rank instead of all weights (needs the extra lora). Default none: full training."""
    lora_alpha: float | None
    """Scale of the adapters. Default twice lora_rank."""
    lora_target_modules: list[str] | tuple[str, ...] | None
    """Names of the modules that get adapters. Default all linear layers."""
    save_every: int | None
    """Steps between checkpoints; null saves only at the end. Default 100."""
    keep_checkpoints: int
    """Newest checkpoints to keep; the best one is always kept besides. Default 2."""
    checkpoint_dtype: Literal["auto", "fp32"]
    """Precision of the weights in checkpoints. auto is that of the model as it was loaded (a bf16 model stays one); the fp32 weights of training are kept beside for resume. Default auto."""
    eval_every: int | None
    """Steps between evaluations of the validation data. Default: at every checkpoint and at the end."""
    resume: bool | Literal["auto", "required", "never"]
    """auto continues the run of the same settings if there is one that is not finished or shorter, required fails if there is none, never begins another one beside. In Python also True and False. Default auto."""
    logged_completions: int
    """Sample completions with their rewards that each GRPO step writes to completions.jsonl. Default 2."""
    tensorboard: bool
    """Write TensorBoard event files beside metrics.jsonl. Default false."""
    report_to: Literal["tensorboard", "wandb", "mlflow", "trackio", "none"] | Sequence[str] | None
    """Where metrics and settings go besides metrics.jsonl: tensorboard, wandb, mlflow, trackio, or several (each an extra). Their own variables say where to and as whom, such as WANDB_MODE=offline. Default nowhere."""
    log_level: Literal["debug", "info", "warning", "error", "DEBUG", "INFO", "WARNING", "ERROR"]
    """Least severe level that is printed. Default info."""
    log_every: int
    """Steps between printed lines of metrics, where no panel shows them. The first and the last step and those that evaluate are always printed; metrics.jsonl and the log of a pod have every step. Default 1."""
    chat_template: str | None
    """Jinja text of a chat template, in place of the tokenizer's own; saved with the checkpoints. Default the tokenizer's."""
    chat_template_kwargs: Mapping[str, Any]
    """Values that the chat template asks for by name, for example enable_thinking. Default none."""
    trust_remote_code: bool
    """Run model code that comes with the checkpoint. Default false."""
    normalize_rewards: bool
    """Divide advantages by the spread of the group. Default true."""
    use_leave_one_out_baseline: bool
    """Compare each reward with the mean of the others of its group, rather than of all. Default true."""
    advantage_statistics: Literal["leave_one_out", "leave_one_out_mean", "group"] | None
    """Whose mean and deviation a reward is compared with: leave_one_out both of the others of its group, leave_one_out_mean the mean of the others and the deviation of all, group both of all (GRPO as published). Default leave_one_out, or group where use_leave_one_out_baseline is false."""
    dynamic_sampling_rounds: int
    """Further rounds of rollouts of a step, in which other rows take the places of those whose completions all have the same reward, since these teach nothing (DAPO). Default 0."""
    max_new_tokens: int
    """Longest completion, in tokens. Default 512."""
    temperature: float
    """Sampling temperature; the loss uses the same. Default 1."""
    top_k: int | None
    """Sample only among the k likeliest tokens. Default all."""
    top_p: float
    """Sample only among the likeliest tokens that together have this probability. Default 1."""
    loss_type: Literal["dapo", "grpo", "dr_grpo", "gspo", "cispo"]
    """How token losses are averaged: dapo over all tokens of the batch, grpo first within each completion, dr_grpo by the constant max_new_tokens. gspo clips one ratio for each completion (its clips are small: 0.0003 and 0.0004), cispo clips the weight of a token and keeps its gradient. Default dapo."""
    clip_low: float
    """The probability ratio is clipped below at 1 - clip_low; 1 is no bound. Default 0.2."""
    clip_high: float
    """The probability ratio is clipped above at 1 + clip_high; DAPO uses 0.28. Default 0.2."""
    dual_clip: float | None
    """Bound of the loss of tokens with negative advantage, times the advantage; 3 is usual. Default none."""
    num_iterations: int
    """Optimizer updates from each batch of rollouts; with mini_batch_size passes over it. Default 1."""
    mini_batch_size: int | None
    """Prompts of one optimizer update: a batch of rollouts is cut into mini-batches, in the order of its rows, with one update for each. Default the whole batch."""
    importance_correction: Literal["auto", "none", "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"]
    """Weighs tokens by their probability in training over that in sampling: truncate bounds this ratio, mask leaves out what is beyond the bounds, each for tokens or for whole completions. auto: token_truncate for rollouts of another engine or of older weights, none for the trainer's own. Default auto."""
    importance_max: float | None
    """Upper bound of that ratio; null is none. Default 2."""
    importance_min: float | None
    """Lower bound of that ratio. Default none."""
    beta: float
    """GRPO: Weight of the KL divergence to the reference model; 0 loads no reference. Default 0. DPO: Strength of the tie to the reference model. Default 0.1."""
    kl_estimator: Literal["k1", "k2", "k3"]
    """Estimator of that divergence (Schulman). Default k3."""
    use_kl_in_reward: bool
    """Subtract beta times the divergence from the rewards, rather than adding it to the loss; k1 is its usual estimator. Default false."""
    stop: list[str] | tuple[str, ...]
    """Texts that end a completion, which keeps them; the name of a token is that token. Default none but the model's end tokens."""
    stop_token_ids: list[int] | tuple[int, ...]
    """Ids of further tokens that end a completion. Default none but the model's end tokens."""
    mask_truncated_completions: bool
    """Leave completions that ran into max_new_tokens out of the loss. Default false."""
    preference_loss: Literal["sigmoid", "ipo", "hinge"]
    """Loss of a pair's margin. Default sigmoid."""
    label_smoothing: float
    """Share of pairs assumed to be labelled the wrong way round (sigmoid only). Default 0."""
    nll_weight: float
    """Weight of the chosen completions' negative log-likelihood per token, added to the loss. Default 0."""
    train_on_prompt: bool
    """Train on the prompt's tokens too, not only on completions and assistant turns. Default false."""
    reward_weights: Sequence[float] | Mapping[str, float]
    """Weight of each reward where the entrypoint is a list of several. Default 1 each."""
    reward_workers: int
    """Processes that call the reward at the same time, in each process that trains. Default 1."""
    reward_timeout: float
    """Seconds after which one call of the reward counts as failed. Default 60."""
    on_reward_error: Literal["raise", "zero", "drop"]
    """What a reward that raises, hangs or returns no finite number does: raise ends the job, zero scores 0, drop leaves the completion out. Default raise."""
    split: str
    """Split of a hub data set, as in datasets.load_dataset (slices like train[:1000] work). Default train."""
    subset: str | None
    """Configuration name of a hub data set (second argument of load_dataset). Default none."""
    data_dir: str | None
    """Folder within a hub data set, for example preference for nvidia/HelpSteer2. Default none."""
    streaming: bool | None
    """Read a hub data set as a stream, taking only the rows that the run needs. Default: only for sets known to be huge."""
    max_rows: int | None
    """Use at most this many rows. Default all."""
    nodes: int
    """Pods that train together. Default 1."""
    gpus: int
    """GPUs of each pod (nvidia.com/gpu, or gpuResource); 0 trains on the CPU. Default 1."""
    gpu_resource: str
    """What gpusPerNode counts, by the name that the device plugin gives it: amd.com/gpu, nvidia.com/mig-3g.40gb. Default nvidia.com/gpu."""
    extra_resources: Mapping[str, int]
    """Further extended resources of each pod, by name, request and limit alike: {"rdma/hca": 1}. Default none."""
    device_claims: Sequence[Mapping[str, Any]]
    """Devices of each pod by dynamic resource allocation, each from a ResourceClaimTemplate. Default none."""
    cpu: str | None
    """CPUs of each pod, request and limit alike. Default none asked."""
    memory: str | None
    """Memory of each pod, request and limit alike. Default: 1Gi is asked for, without a limit."""
    ephemeral_storage: str | None
    """Disk of each pod's node for what is no volume (downloads, scratch), request and limit alike. Default: 1Gi is asked for, without a limit."""
    shared_memory: str
    """Size of /dev/shm. Default 1Gi."""
    uri: str | None
    """Object store in place of a claim: s3://bucket/folder, gs://… or az://…; the job writes to the folder with its name below. Credentials come from env, envFrom or the service account. Default none."""
    claim: str | None
    """Existing PersistentVolumeClaim to write to. Default: one is made for the job."""
    size: str
    """Size of the claim that is made. Default 20Gi."""
    storage_class_name: str | None
    """StorageClass of that claim. Default: the cluster's default."""
    access_mode: Literal["ReadWriteOnce", "ReadWriteMany", "ReadWriteOncePod"] | None
    """Access mode of that claim. Default ReadWriteOnce for one node, ReadWriteMany for several."""
    retain: bool
    """Keep the claim when the job is deleted. Default true."""
    serve_until: str | None
    """While this time (RFC 3339) is in the future, a pod serves the output for download. Default: not served."""
    hub: str | None
    """Repository of the Hugging Face hub, owner/name, to which the best checkpoint is uploaded at the end. The token with the right to write is the environment variable HF_TOKEN, which comes from a Secret; the run is refused at its start without it. Default: nothing is uploaded."""
    hub_private: bool
    """Whether that repository is private where it is made by this run. Default true."""
    rollout_python: str | PathLike[str] | None
    """Python interpreter that has vLLM 0.30 to 0.33: a server is started with it beside the trainer and ends with the run. vLLM needs another torch, so it is never the trainer's own interpreter."""
    rollout: Literal["in_process", "vllm"] | Mapping[str, Any] | None
    """What samples the completions of grpo; in Python a mapping such as {"engine": "vllm", "replicas": 2}. Default: the processes that train."""
    cache: Mapping[str, Any]
    """Where hub downloads are kept."""
    image: str | None
    """Trainer image. Default: the one the operator was installed with."""
    image_pull_policy: Literal["Always", "IfNotPresent", "Never"] | None
    """When the image is pulled. Default IfNotPresent."""
    image_pull_secrets: Sequence[Mapping[str, Any]]
    """Secrets for the image's registry. Default none."""
    service_account_name: str | None
    """Service account of the pods; its token is never mounted. Default: the namespace's default."""
    env: Mapping[str, str] | Sequence[Mapping[str, Any]]
    """Environment variables of the trainer. Default none."""
    env_from: Sequence[Mapping[str, Any]]
    """Secrets whose keys become environment variables. Default none."""
    node_selector: Mapping[str, str]
    """Labels that a node must have. Default none."""
    tolerations: Sequence[Mapping[str, Any]]
    """Taints that the pods tolerate. Default none."""
    affinity: Mapping[str, Any] | None
    """Affinity of the pods, as in the core API. Default none."""
    topology_spread_constraints: Sequence[Mapping[str, Any]]
    """How the pods are spread over nodes, racks or zones. Default by the cluster."""
    runtime_class_name: str | None
    """RuntimeClass of the trainer pods; some clusters need nvidia for GPUs. Default the nodes' own runtime."""
    volumes: Sequence[Mapping[str, Any]]
    """Further volumes of the trainer pods, each with the place where it is mounted. Default none."""
    host_network: bool
    """The trainer pods use the network of their nodes, past the pod network and its policies. Default false."""
    capabilities: list[Literal["IPC_LOCK"]] | tuple[Literal["IPC_LOCK"], ...]
    """Capabilities of the trainer's container. IPC_LOCK: programs of the image whose files carry it (setcap) may lock memory, as RDMA does. Default none."""
    priority_class_name: str | None
    """PriorityClass of the pods. Default none."""
    scheduler_name: str | None
    """Scheduler of the pods. Default the cluster's default scheduler."""
    labels: Mapping[str, str]
    """Further labels of the pods. Default none."""
    annotations: Mapping[str, str]
    """Further annotations of the pods. Default none."""
    suspend: bool
    """true saves, stops and frees the pods; false goes on from the last checkpoint. Default false."""
    backoff_limit: int
    """Failed attempts that are retried. Disruptions by others are retried without counting, as long as checkpoints come of it. Default 3."""
    active_deadline_seconds: int | None
    """Seconds that the job may run in all: time in which pods run or start. No queue, no pause and no wait for a node counts. Default no limit."""
    budget: Mapping[str, Any] | None
    """What the job may use up before it is suspended; {gpuHours: 100}, for example. Default no limit."""
    ttl_seconds_after_finished: int | None
    """Seconds after its end that the job is deleted. Default never."""
    termination_grace_period_seconds: int
    """Seconds that a pod has to save when it is stopped. Default 120."""
    startup_timeout_seconds: int
    """Seconds until all pods of an attempt run. Then the attempt gives its nodes back and is repeated; that never counts. Also the time that loading may take in silence. Default 3600."""
    stall_timeout_seconds: int
    """Seconds without any sign of progress (tokens, micro-batches, steps, checkpoints) after which an attempt counts as stuck, fails with the stacks of its processes, and is retried. Rewards get their own time besides. Default 1800."""
    on_node_lost: Literal["wait", "replace"]
    """When a pod does not end because its node is silent: wait until somebody says that the pod is gone, or replace, which starts the next attempt; a write lease in the output keeps the lost pod from writing. Default wait."""
    gpus_per_node: int
    """Another name of gpus."""


class TrainKeywords(Settings, total=False):
    """What `train()` takes by name beyond its signature."""

    backend: Literal["auto", "local", "kubernetes"] | None
    """Where to train; auto looks for a cluster. Default auto."""
    name: str | None
    """Name of the job on a cluster. Default: made from the model and the call."""
    namespace: str | None
    """Namespace of the job on a cluster. Default: that of the context."""
    secrets: list[str] | tuple[str, ...]
    """Secrets whose keys become environment variables: KEY, or name-of-secret/KEY."""
    tokenizer: Any
    """Tokenizer of a model that is given as an object; also a hub name or a folder. Default: the model's."""
    validation_dataset: Any
    """Rows that are only evaluated, in any form that the data set may have. Default none."""


class TrainerKeywords(Settings, total=False):
    """What `from_pretrained` of the trainers takes by name."""

    max_steps: int
    """Optimizer steps after which training ends. Default 1000."""
    max_epochs: int
    """Passes over the data after which training ends, if max_steps is not reached before. Default 1."""
    learning_rate: float | None
    """Peak learning rate of AdamW. Default 1e-6 for grpo, 2e-5 for sft, 5e-7 for dpo; with lora_rank 1e-5, 1e-4 and 1e-5."""
    batch_size: int
    """Rows per optimizer step: prompts (GRPO), examples (SFT) or pairs (DPO). Default 32."""
    num_generations_per_prompt: int
    """Completions sampled for each prompt; they form one group. Default 16."""
