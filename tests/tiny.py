"""Tiny models of every family, built from a config: 16 hidden units, random weights, no download."""

from __future__ import annotations

from typing import Any

import torch
import transformers as T
from torch import nn

FAMILIES = (
    "bert", "roberta", "distilbert", "electra", "deberta-v2", "albert", "mpnet", "modernbert", "gpt2", "llama", "qwen2", "t5",
)  # fmt: skip


def config(family: str, *, labels: int = 3, layers: int = 3, dropout: float = 0.0) -> Any:
    common: dict[str, Any] = {"vocab_size": 64, "num_labels": labels, "pad_token_id": 0}
    bert = {
        **common,
        "hidden_size": 16,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 32,
        "max_position_embeddings": 64,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
    }
    llama = {
        **common, "hidden_size": 16, "num_hidden_layers": layers, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 32, "max_position_embeddings": 64, "attention_dropout": dropout,
    }  # fmt: skip
    match family:
        case "bert":
            return T.BertConfig(**bert)
        case "roberta":
            return T.RobertaConfig(**bert)
        case "electra":
            return T.ElectraConfig(**bert, embedding_size=8)
        case "deberta-v2":
            return T.DebertaV2Config(
                **bert, relative_attention=True, position_buckets=8, pos_att_type=["p2c", "c2p"], norm_rel_ebd="layer_norm",
                share_att_key=True, pooler_hidden_size=16, pooler_dropout=dropout,
            )  # fmt: skip
        case "albert":
            return T.AlbertConfig(**bert, embedding_size=8, classifier_dropout_prob=dropout)
        case "mpnet":
            return T.MPNetConfig(**bert)
        case "distilbert":
            return T.DistilBertConfig(
                **common, dim=16, n_layers=layers, n_heads=2, hidden_dim=32, max_position_embeddings=64, dropout=dropout,
                attention_dropout=dropout, seq_classif_dropout=dropout,
            )  # fmt: skip
        case "modernbert":
            return T.ModernBertConfig(
                **common, hidden_size=16, num_hidden_layers=layers, num_attention_heads=2, intermediate_size=32,
                max_position_embeddings=64, mlp_dropout=dropout, attention_dropout=dropout, embedding_dropout=dropout,
                classifier_dropout=dropout, cls_token_id=1, sep_token_id=2, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "gpt2":
            return T.GPT2Config(
                **common, n_embd=16, n_layer=layers, n_head=2, n_inner=32, n_positions=64, resid_pdrop=dropout,
                embd_pdrop=dropout, attn_pdrop=dropout, bos_token_id=1, eos_token_id=2,
            )  # fmt: skip
        case "llama":
            return T.LlamaConfig(**llama)
        case "qwen2":
            return T.Qwen2Config(**llama)
        case "t5":
            return T.T5Config(
                **common, d_model=16, d_kv=8, d_ff=32, num_layers=layers, num_heads=2, dropout_rate=dropout
            )
    raise KeyError(family)


def tiny(
    family: str,
    *,
    head: bool = True,
    labels: int = 3,
    layers: int = 3,
    meta: bool = False,
    seed: int = 0,
    dropout: float = 0.0,
) -> nn.Module:
    """A tiny model of ``family`` in eval mode; the global generator is left as it was."""
    made = config(family, labels=labels, layers=layers, dropout=dropout)
    with torch.random.fork_rng(), torch.device("meta" if meta else "cpu"):
        torch.manual_seed(seed)
        if family == "t5":
            model = T.T5ForTokenClassification(made) if head else T.T5EncoderModel(made)
        else:
            kind = T.AutoModelForSequenceClassification if head else T.AutoModel
            model = kind.from_config(made)
    return model.eval()
