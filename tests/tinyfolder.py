"""A tiny pretrained model on disk: what a user's local folder looks like, at 16 hidden units."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

SPECIALS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
WORDS = (
    "good", "bad", "fine", "awful", "great", "poor", "film", "book", "plot", "cast", "the", "a", "is", "was", "and",
    "not", "very", "so", "it", "this",
)  # fmt: skip


def tiny_tokenizer(words: Sequence[str] = WORDS, *, max_length: int = 64) -> PreTrainedTokenizerFast:
    """One token a word, ``[CLS] a [SEP] b [SEP]``; unknown words are ``[UNK]``."""
    vocabulary = {word: number for number, word in enumerate((*SPECIALS, *words))}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocabulary["[CLS]"]), ("[SEP]", vocabulary["[SEP]"])],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length,
        model_input_names=["input_ids", "token_type_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def tiny_config(
    words: Sequence[str] = WORDS, *, layers: int = 2, positions: int = 64, dropout: float = 0.1
) -> BertConfig:
    """BERT with 16 hidden units, 2 heads and ``layers`` blocks."""
    return BertConfig(
        vocab_size=len(SPECIALS) + len(words),
        hidden_size=16,
        num_hidden_layers=layers,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        pad_token_id=0,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
    )


def tiny_folder(
    path: Path, words: Sequence[str] = WORDS, *, layers: int = 2, seed: int = 0, dropout: float = 0.1
) -> Path:
    """Saves a tiny pretrained BERT (body and pooler, no head) and its tokenizer to ``path``; gives ``path`` back.

    The weights come from ``seed``; torch's global generator is left as it was.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        BertModel(tiny_config(words, layers=layers, dropout=dropout)).save_pretrained(path)
    tiny_tokenizer(words).save_pretrained(path)
    return path
