"""What is known of families: what a user may declare, and the few modules whose place in the code is not their place in the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Role = Literal["embeddings", "block", "bridge", "head"]

# Modules that stand beside the blocks, or after them, in the code, but feed every block: they belong to the embeddings.
FEEDS_ALL_BLOCKS = frozenset({
    "rel_embeddings", "relative_attention_bias", "embeddings_project", "embedding_hidden_mapping_in",
    "rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias",
})  # fmt: skip

POOLER = "pooler"  # a dense layer and an activation on one token, in every family that has one

# Modules that some families (OPT, Nomic BERT, GTE) name before the blocks in the code, but run after them: they are the bridge.
AFTER_ALL_BLOCKS = frozenset({POOLER, "final_layer_norm", "project_out"})

# (model_type, module inside the backbone) that belongs to the embeddings though its name is any norm's.
EMBEDDINGS = {("deberta-v2", "encoder.LayerNorm"), ("deberta", "encoder.LayerNorm")}

# Families whose blocks all use one set of weights.
SHARED = frozenset({"albert"})


@dataclass(frozen=True)
class Family:
    """Where the parts of a model are: module names, each standing for all that is inside it.

    Args:
        blocks: the ModuleList or Sequential of blocks, such as ``encoder.layers``; empty where Luthier finds the parts by itself, and the
            others say what it should take otherwise.
        embeddings, bridge, head: modules, or single weights such as ``cls_token``; weights named nowhere are faults when ``blocks`` is
            given.
        shared: whether all blocks use one set of weights.
    """

    blocks: str = ""
    embeddings: tuple[str, ...] = ()
    bridge: tuple[str, ...] = ()
    head: tuple[str, ...] = ()
    shared: bool = False
