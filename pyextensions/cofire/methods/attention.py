# SPDX-License-Identifier: Apache-2.0
"""What the methods that replace attentions have to know of a vision transformer."""

from __future__ import annotations

from collections.abc import Collection

from torch import nn

#: Attributes of an attention that mean that its logits are not ``q k^T``, by what they are.
OBSTACLES = {
    "rotary positions": ("rope", "rotary", "rotary_emb", "rotary_embedding", "rotary_pos_emb"),
    "a relative bias": (
        "relative_position_bias_table", "relative_position_bias", "relative_attention_bias", "rel_pos", "rel_pos_bias",
        "rel_pos_h", "rel_pos_w",
    ),
    "a norm of queries or keys": ("q_norm", "k_norm"),
}  # fmt: skip
KEY_HEADS = ("num_kv_heads", "num_key_value_heads", "kv_heads", "num_kv")


def edges_of(model: nn.Module, attentions: Collection[str]) -> set[str]:
    """The names of the first and the last layer."""
    kinds = (nn.Linear, nn.modules.conv._ConvNd)
    inside = tuple(f"{name}." for name in attentions)
    layers = [
        n for n, m in model.named_modules() if n in attentions or (isinstance(m, kinds) and not n.startswith(inside))
    ]
    return {layers[0], layers[-1]}
