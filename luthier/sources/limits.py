"""What model and tokenizer can take: a pad token, which tokens and types, and how many tokens."""

from __future__ import annotations

from typing import Any

from torch import nn

from luthier.errors import Fault, ModelError

DEFAULT_MAX_LENGTH = 512


def error(fault: Fault, inside: str) -> ModelError:
    """A ModelError with one fault."""
    return ModelError.of([fault], inside)  # type: ignore[return-value]


def pad(model: Any, tokenizer: Any, name: str) -> None:
    """A pad token where tokenizer or config lacks one, or the config's is no token: the other's, else the end-of-sequence token; in place.

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
        known = _configs_pad_id(model)
        tokenizer.pad_token = tokenizer.eos_token if known is None else tokenizer.convert_ids_to_tokens(known)
    if tokenizer.pad_token_id is None:
        do = "Set tokenizer.pad_token and save it beside the model."
        raise error(Fault(f"{name}, tokenizer", "must have a pad or an end token", "neither", do), "the model")
    if _configs_pad_id(model) is None:
        model.config.pad_token_id = tokenizer.pad_token_id


def pad_id(model: Any, tokenizer: Any) -> int:
    """The token that fills batches up: the config's where the model has it, else the tokenizer's, else 0.

    The config's comes first as decoders look for it to find where a row ends. Where the two differ, the tokenizer's
    would be read as the row's last token.
    """
    known = _configs_pad_id(model)
    return int(known if known is not None else getattr(tokenizer, "pad_token_id", None) or 0)


def _configs_pad_id(model: Any) -> int | None:
    """The config's pad token; None where there is none, or the vocabulary does not have it (-1)."""
    config = model.config.get_text_config()
    known, size = getattr(model.config, "pad_token_id", None), getattr(config, "vocab_size", None)
    known = getattr(config, "pad_token_id", None) if known is None else known
    return known if isinstance(known, int) and known >= 0 and (size is None or known < size) else None


def rows_for(model: Any, tokenizer: Any, name: str) -> None:
    """Sees that the model has an embedding for each token of its tokenizer.

    Raises:
        ModelError: the tokenizer knows more, as one does to which tokens were added.
    """
    try:
        table = model.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return
    most = max(tokenizer.get_vocab().values())
    if isinstance(table, nn.Embedding) and most >= table.num_embeddings:
        do = "Call model.resize_token_embeddings(len(tokenizer)), and save both again."
        must = f"must have an embedding for each token of its tokenizer, {most + 1}"
        raise error(Fault(name, must, str(table.num_embeddings), do), "the model")


def types(model: Any, tokenizer: Any) -> None:
    """Has the tokenizer give no token types where the model knows one type only, in place.

    A pair's second text would be of type 1, which such a model has no embedding for.
    """
    many = getattr(model.config.get_text_config(), "type_vocab_size", None)
    if many is not None and many < 2 and "token_type_ids" in tokenizer.model_input_names:
        names = [each for each in tokenizer.model_input_names if each != "token_type_ids"]
        tokenizer.model_input_names = tokenizer.init_kwargs["model_input_names"] = names  # the latter is what is saved


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
