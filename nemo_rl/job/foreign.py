"""Names that other libraries and other people use: what each is called here, and the nearest name of a misspelt one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping

# Names of TRL's configurations and trainers, of transformers' TrainingArguments and PEFT, of verl, OpenRLHF and Unsloth.
# {x} is a name of ours, written as the reader of the sentence writes it.
_MEANS: dict[str, str] = {
    # length and batches
    "num_train_epochs": "{max_epochs}",
    "num_epochs": "{max_epochs}",
    "total_epochs": "{max_epochs}",
    "epochs": "{max_epochs}",
    "steps": "{max_steps}",
    "num_steps": "{max_steps}",
    "total_steps": "{max_steps}",
    "iterations": "{max_steps}, the optimizer steps of the run ({num_iterations} are updates from one batch of rollouts)",
    "per_device_train_batch_size": "{batch_size}, which counts the rows of one optimizer step on all devices together; "
    "memory is bounded by {tokens_per_microbatch}",
    "per_device_eval_batch_size": "{tokens_per_microbatch}, the tokens of one pass; it bounds evaluation too",
    "gradient_accumulation_steps": "not needed: {batch_size} counts the rows of one optimizer step, and "
    "{tokens_per_microbatch} how many tokens of them go through the model at once",
    "train_batch_size": "{batch_size}",
    "per_device_batch_size": "{batch_size}, which counts the rows of one optimizer step on all devices together",
    "global_batch_size": "{batch_size}",
    "generation_batch_size": "{batch_size} (prompts) times {num_generations_per_prompt} (completions of each)",
    "micro_batch_size": "{tokens_per_microbatch}, which counts tokens and not rows",
    "train_micro_batch_size": "{tokens_per_microbatch}, which counts tokens and not rows",
    "steps_per_generation": "{num_iterations}, the optimizer updates from each batch of rollouts",
    "auto_find_batch_size": "not needed: {tokens_per_microbatch} bounds memory",
    # rollouts
    "num_generations": "{num_generations_per_prompt}",
    "num_return_sequences": "{num_generations_per_prompt}",
    "group_size": "{num_generations_per_prompt}",
    "rollout_n": "{num_generations_per_prompt}",
    "n_samples_per_prompt": "{num_generations_per_prompt}",
    "max_completion_length": "{max_new_tokens}",
    "max_response_length": "{max_new_tokens}",
    "max_tokens": "{max_new_tokens}",
    "generate_max_len": "{max_new_tokens}",
    "max_prompt_length": "{max_sequence_length}, which bounds prompt and completion together; prompts may be "
    "max_sequence_length - max_new_tokens tokens long, and {overlong_rows} says what becomes of longer ones",
    "temp": "{temperature}",
    # sequences
    "max_length": "{max_sequence_length}",
    "max_seq_length": "{max_sequence_length}",
    "max_seq_len": "{max_sequence_length}",
    "model_max_length": "{max_sequence_length}",
    "truncation_mode": "{overlong_rows}",
    "packing": "not needed: rows are always packed, and never see each other",
    "padding_free": "not needed: rows are always packed, without padding",
    "completion_only_loss": "the default; {train_on_prompt} trains on the prompt's tokens too",
    "assistant_only_loss": "the default; {train_on_prompt} trains on all other tokens too",
    "train_on_inputs": "{train_on_prompt}",
    "dataset_text_field": "the column text; rename your column to text",
    # optimizer
    "lr": "{learning_rate}",
    "actor_learning_rate": "{learning_rate}",
    "lr_scheduler_type": "{lr_schedule} (constant, linear or cosine)",
    "lr_scheduler": "{lr_schedule} (constant, linear or cosine)",
    "scheduler": "{lr_schedule} (constant, linear or cosine)",
    "warmup_ratio": "{warmup_steps}, a number of steps; its default is 5 % of the run, at most 50",
    "optim": "not a choice: the optimizer is AdamW",
    "optimizer": "not a choice: the optimizer is AdamW",
    "max_norm": "{max_grad_norm}",
    "gradient_clipping": "{max_grad_norm}",
    "wd": "{weight_decay}",
    # objective
    "kl_coef": "{beta}",
    "kl_loss_coef": "{beta}",
    "init_kl_coef": "{beta}",
    "epsilon": "{clip_low} and {clip_high}",
    "clip_epsilon": "{clip_low} and {clip_high}",
    "cliprange": "{clip_low} and {clip_high}",
    "clip_range": "{clip_low} and {clip_high}",
    "clip_ratio": "{clip_low} and {clip_high}",
    "epsilon_high": "{clip_high}",
    "delta": "{dual_clip}",
    "scale_rewards": "{normalize_rewards}",
    "rpo_alpha": "{nll_weight}",
    "ppo_epochs": "{num_iterations}, the optimizer updates from each batch of rollouts",
    # rewards and data
    "reward_funcs": "{reward_fn}",
    "reward_func": "{reward_fn}",
    "reward_function": "{reward_fn}",
    "reward": "{reward_fn}",
    "rewards": "{reward_fn}",
    "train_dataset": "{dataset}",
    "data": "{dataset}",
    "eval_dataset": "{validation_dataset}",
    "valid_dataset": "{validation_dataset}",
    "test_dataset": "{validation_dataset}",
    "processing_class": "{tokenizer}",
    "model_name": "{model}",
    "model_name_or_path": "{model}",
    "dataset_name": "{dataset}, which takes the name of a data set on the hub too",
    "dataset_config": "{subset}",
    "dataset_config_name": "{subset}",
    "dataset_split": "{split}",
    "shuffle_dataset": "{shuffle}",
    "system_prompt": "a column of the data set: system_prompt (or system), or a first message with the role system",
    # adapters and precision
    "peft_config": "{lora_rank}, with {lora_alpha} and {lora_target_modules}",
    "lora_r": "{lora_rank}",
    "rank": "{lora_rank}",
    "lora_dropout": "not there: adapters are trained without dropout",
    "target_modules": "{lora_target_modules}",
    "use_peft": "{lora_rank}, for example 16",
    "load_in_4bit": "not there: models are not quantised; {lora_rank} trains adapters of the whole model",
    "load_in_8bit": "not there: models are not quantised; {lora_rank} trains adapters of the whole model",
    "bf16": "{precision}",
    "fp16": "{precision} (auto, fp32 or bf16)",
    "dtype": "{precision} (auto, fp32 or bf16)",
    "torch_dtype": "{precision} (auto, fp32 or bf16)",
    "gradient_checkpointing": "{activation_checkpointing}",
    # checkpoints, evaluation, logging
    "save_steps": "{save_every}",
    "save_strategy": "{save_every}, a number of steps",
    "save_total_limit": "{keep_checkpoints}",
    "eval_steps": "{eval_every}",
    "eval_strategy": "{eval_every}, a number of steps",
    "evaluation_strategy": "{eval_every}, a number of steps",
    "load_best_model_at_end": "not needed: result.checkpoint_path is the best checkpoint",
    "resume_from_checkpoint": "{resume}; the same call with the same {output_dir} goes on from its newest checkpoint",
    "logging_steps": "{log_every}; metrics.jsonl has every step",
    "hub_model_id": "{hub}",
    "push_to_hub": "{hub}, the repository's owner/name; or result.push_to_hub(...) afterwards",
    "hub_private_repo": "{hub_private}",
    "log_completions": "{logged_completions}, the number of samples of each step",
    "num_completions_to_print": "{logged_completions}, the number of samples of each step",
    "run_name": "{output_dir} on this machine, {name} on a cluster",
    "logging_dir": "{output_dir}; TensorBoard files are in its folder tensorboard",
    "verbose": "{log_level}",
    # devices
    "n_gpus": "{gpus}, the GPUs of each pod",
    "num_gpus": "{gpus}, the GPUs of each pod",
    "n_gpus_per_node": "{gpus}, the GPUs of each pod",
    "num_nodes": "{nodes}",
    "nnodes": "{nodes}",
    "device": "not a choice: CUDA where torch sees a GPU, else the CPU; {gpus} 0 asks for the CPU",
    "ddp": "not needed: several GPUs share the model by FSDP2",
    "fsdp": "not needed: several GPUs share the model by FSDP2",
    "deepspeed": "not needed: several GPUs share the model by FSDP2",
}

_ALGORITHMS: dict[str, str] = {
    "ppo": "PPO with a value model is not there; the nearest is 'grpo', which takes the group's mean in its place",
    "rloo": "it is 'grpo' with normalize_rewards=False: the leave-one-out baseline is the default there",
    "reinforce": "the nearest is 'grpo', which compares each completion with others of the same prompt",
    "reinforce++": "the nearest is 'grpo', which compares each completion with others of the same prompt",
    "dapo": "it is 'grpo' with loss_type='dapo' (the default) and clip_high=0.28",
    "dr_grpo": "it is 'grpo' with loss_type='dr_grpo' and normalize_rewards=False",
    "gspo": "it is 'grpo' with loss_type='gspo'",
    "cispo": "it is 'grpo' with loss_type='cispo'",
    "ipo": "it is 'dpo' with preference_loss='ipo'",
    "finetune": "supervised fine-tuning is 'sft'",
    "fine-tune": "supervised fine-tuning is 'sft'",
    "supervised": "supervised fine-tuning is 'sft'",
    "rl": "reinforcement learning from a reward is 'grpo'",
    "rlhf": "reinforcement learning from a reward is 'grpo', learning from preferences is 'dpo'",
    "rlvr": "reinforcement learning from a reward is 'grpo'",
    "orpo": "it is not there; learning from preferences is 'dpo', with nll_weight for a term of likelihood",
    "kto": "it is not there; learning from preferences is 'dpo', which needs pairs",
}


def foreign_names() -> Mapping[str, tuple[str, ...]]:
    """Every name of others that is recognised, with the names of ours that its sentence mentions."""
    return {name: tuple(part.split("}")[0] for part in text.split("{")[1:]) for name, text in _MEANS.items()}


def meaning_of(name: str, write: Mapping[str, str] | None = None, skip: Iterable[str] = ()) -> str | None:
    """ "in nemo-rl this is …" for a name that others use, else None.

    `write` gives names of ours another form (the YAML path, for example). None, too, where the only names of ours in
    the sentence are among `skip`: those that the reader cannot use.
    """
    key = name.strip().lower().replace("-", "_")
    if key not in _MEANS:
        return None
    ours = foreign_names()[key]
    if ours and set(ours) <= set(skip):
        return None
    written = {name: (write or {}).get(name, name) for name in ours}
    text = _MEANS[key].format(**written)
    return f"in nemo-rl this is {text}"


def algorithm_meaning(name: str) -> str | None:
    """What an algorithm of another library is here, or what comes nearest, else None."""
    return _ALGORITHMS.get(name.strip().lower())


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name of which `name` is a misspelling: a letter missing, doubled, wrong or in another place; else None.

    Names that only look alike (num_generations, num_iterations) are not taken for each other.
    """
    plain = {_plain(candidate): candidate for candidate in known}
    given = _plain(name)
    near = difflib.get_close_matches(given, plain, n=1, cutoff=0.85)
    if near:
        return plain[near[0]]
    return next((plain[other] for other in plain if sorted(other) == sorted(given)), None)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
