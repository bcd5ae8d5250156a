"""What model and tokenizer can take: a pad token, and how many tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from luthier.errors import Fault, ModelError

DEFAULT_MAX_LENGTH = 512


def error(fault: Fault, inside: str) -> ModelError:
    """A ModelError with one fault."""
    return ModelError.of([fault], inside)  # type: ignore[return-value]


def pad(model: Any, tokenizer: Any, name: str) -> None:
    """A pad token where tokenizer or config lacks one: the other's, else the end-of-sequence token; in place.

    Raises:
        ModelError: there is neither; or the tokenizer knows no word, as transformers makes one where no files are.
    """
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        do = "Save the model's tokenizer beside it: tokenizer.save_pretrained(folder)."
        raise error(
            Fault(f"{name}, tokenizer", "must know words", "special tokens only: its files are missing", do),
            "the model",
        )
    if tokenizer.pad_token_id is None:
        known = model.config.get_text_config().pad_token_id
        tokenizer.pad_token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
    if tokenizer.pad_token_id is None:
        do = "Set tokenizer.pad_token and save it beside the model."
        raise error(Fault(f"{name}, tokenizer", "must have a pad or an end token", "neither", do), "the model")
    if getattr(model.config, "pad_token_id", None) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def pad_id(model: Any, tokenizer: Any) -> int:
    """The token that fills batches up: the tokenizer's, else the config's, else 0."""
    known = getattr(tokenizer, "pad_token_id", None)
    return int(known if known is not None else model.config.pad_token_id or 0)


def positions_of(model: Any) -> int | None:
    """How many tokens the model has positions for; None where any number goes (relative positions)."""
    for name, module in model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return module.num_embeddings - module.padding_idx - 1  # RoBERTa counts positions from beyond the pad token
    config = model.config.get_text_config()
    told = getattr(config, "max_position_embeddings", None)
    return told if isinstance(told, int) and told > 0 and not getattr(config, "relative_attention", False) else None


def max_length_of(model: Any, tokenizer: Any, asked: int | None, name: str) -> int:
    """Tokens at which texts are cut: as asked where the model can, else the least of tokenizer, model and 512.

    Raises:
        ModelError: more than the model has positions for, or too few for a pair of one-token texts.
    """
    positions = positions_of(model)
    if asked is None:
        return min(int(tokenizer.model_max_length), positions or DEFAULT_MAX_LENGTH, DEFAULT_MAX_LENGTH)
    fewest = tokenizer.num_special_tokens_to_add(pair=True) + 2
    if asked < fewest or (positions is not None and asked > positions):
        most = f" and at most {positions}, the positions {name} has" if positions else ""
        raise error(Fault("max_length", f"must be at least {fewest}{most}", str(asked)), "the model's options")
    return asked
