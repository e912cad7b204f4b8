"""What a model can take: token ids that its embedding has rows for, and positions that it has a table for."""

from __future__ import annotations

from typing import Any

from torch import nn

from nemo_rl.model.kinds import describe


def check_tokens(model: Any, largest: int, tokenizer: Any = None) -> None:
    """Raises ValueError where a token of the data is beyond the model's embedding."""
    embedding = model.get_input_embeddings()
    rows = getattr(getattr(embedding, "weight", None), "shape", [largest + 1])[0]
    if largest < rows:
        return
    words = f" ({tokenizer.convert_ids_to_tokens(largest)!r})" if hasattr(tokenizer, "convert_ids_to_tokens") else ""
    size = (
        f"the tokenizer has {len(tokenizer)} tokens"
        if hasattr(tokenizer, "__len__")
        else "the tokenizer has more tokens"
    )
    raise ValueError(
        f"found token {largest}{words} in the data, but the embedding of {describe(model)} has {rows} rows, while {size}; "
        f"call model.resize_token_embeddings(len(tokenizer)) and save the model, or use the tokenizer that belongs to it"
    )


def check_positions(model: Any, longest: int, what: str) -> None:
    """Raises ValueError where sequences outgrow a table of learned positions. Models without such a table take any length."""
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise ValueError(
            f"found {what} of up to {longest} tokens, but {describe(model)} has positions for {limit} (its config's "
            f"max_position_embeddings); set max_sequence_length to at most {limit}"
        )


def position_limit(model: Any) -> int | None:
    """Returns the number of positions of a model that keeps a table of them, None for models that compute positions."""
    config = model.config.get_text_config()
    names = ("max_position_embeddings", "n_positions", "max_seq_len")
    limits = [value for name in names if isinstance(value := getattr(config, name, None), int)]
    vocabulary = model.get_input_embeddings()
    tables = [m.num_embeddings for m in model.modules() if isinstance(m, nn.Embedding) and m is not vocabulary]
    # some families keep a few rows more, an offset before the first position
    return min((limit for limit in limits if any(limit <= rows <= limit + 8 for rows in tables)), default=None)
