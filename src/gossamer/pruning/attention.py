"""Attention with fewer heads than it was made with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from gossamer.errors import ArgumentError

_COUNTS = ("num_heads", "n_heads", "num_attention_heads", "n_head", "nhead", "heads")
_WIDTHS = ("all_head_size", "attn_dim", "inner_dim", "embed_dim", "dim", "hidden_size", "n_embd")


class FewerHeads(nn.MultiheadAttention):
    """An nn.MultiheadAttention whose heads together are not as wide as its embedding, for heads or channels are gone.

    It has the parameters of the one that it was, under the same names, of shapes (3·heads·head_dim, embed_dim) and
    (embed_dim, heads·head_dim), and its forward pass takes and gives the same. Pruning makes it; nobody else has to.
    """

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """softmax(Q·Kᵀ / √head_dim)·V, head by head (Vaswani et al. 2017, arXiv:1706.03762), then `out_proj`.

        Args:
            query: (batch, length, embed_dim); without the batch, or with length first where `batch_first` is False.
            key: as query, of another length.
            value: as key.
            key_padding_mask: (batch, length of keys): True, or -inf, where a key is to be left out.
            need_weights: whether to give the attention weights too.
            attn_mask: (lengths) or (batch·heads, lengths): True, or -inf, where attention may not go.
            average_attn_weights: give one average over the heads, not one a head.
            is_causal: a hint that `attn_mask` is the causal one.

        Returns:
            The output, shaped like the query, and the weights or None.
        """
        is_single = query.ndim == 2
        if is_single:
            query, key, value = (t.unsqueeze(0) for t in (query, key, value))
        elif not self.batch_first:
            query, key, value = (t.transpose(0, 1) for t in (query, key, value))
        whole: Any = self  # which is typed as if none of its parameters were ever missing
        weights = whole.in_proj_weight.chunk(3)
        biases = (None, None, None) if whole.in_proj_bias is None else whole.in_proj_bias.chunk(3)
        batch = query.shape[0]
        q, k, v = (
            F.linear(t, w, b).view(batch, -1, self.num_heads, self.head_dim).transpose(1, 2)
            for t, w, b in zip((query, key, value), weights, biases, strict=True)
        )
        bias = _as_bias(attn_mask, key_padding_mask, q, k.shape[2])
        dropout = self.dropout if self.training else 0.0
        attention: Tensor | None = None
        if need_weights:
            scores = q @ k.transpose(-2, -1) / self.head_dim**0.5
            attention = F.dropout(torch.softmax(scores if bias is None else scores + bias, -1), dropout)
            mixed = attention @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, bias, dropout)
        out = self.out_proj(mixed.transpose(1, 2).reshape(batch, -1, self.num_heads * self.head_dim))
        if attention is not None and average_attn_weights:
            attention = attention.mean(1)
        if is_single:
            return out.squeeze(0), None if attention is None else attention.squeeze(0)
        return out if self.batch_first else out.transpose(0, 1), attention


def _as_bias(attn_mask: Tensor | None, padding: Tensor | None, q: Tensor, keys: int) -> Tensor | None:
    bias: Tensor | None = None
    for mask, shape in (
        (attn_mask, (-1, q.shape[1] if attn_mask is not None and attn_mask.ndim == 3 else 1, q.shape[2], keys)),
        (padding, (-1, 1, 1, keys)),
    ):
        if mask is None:
            continue
        added = (
            torch.zeros_like(mask, dtype=q.dtype).masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else mask
        )
        added = added.to(q.dtype).view(shape)
        bias = added if bias is None else bias + added
    return bias


def heads_of(module: nn.MultiheadAttention) -> int:
    """The heads of an attention that can be cut; 0 where queries, keys and values have projections apart.

    Example:
        >>> heads_of(nn.MultiheadAttention(8, 2)), heads_of(nn.MultiheadAttention(8, 2, kdim=4))
        (2, 0)
    """
    whole: Any = module
    can = whole.in_proj_weight is not None and whole.bias_k is None and not whole.add_zero_attn
    return module.num_heads if can else 0


def loosen(module: nn.MultiheadAttention) -> None:
    """Lets the heads of an attention be fewer than its embedding is wide; parameters and hooks stay.

    Example:
        >>> attention = nn.MultiheadAttention(8, 2); loosen(attention); type(attention).__name__
        'FewerHeads'
    """
    if isinstance(module, FewerHeads):
        return
    if type(module) is not nn.MultiheadAttention:
        raise ArgumentError(
            f"a {type(module).__name__} computes attention in its own way, so its heads cannot be cut; exclude it"
        )
    module.__class__ = FewerHeads
    module._qkv_same_embed_dim = False  # keeps nn.TransformerEncoderLayer from the kernel that needs all heads


def head_count(module: nn.Module) -> tuple[str, int] | None:
    """Under what name a module of attention keeps its number of heads, and the number; None where it has none.

    Example:
        >>> head_count(nn.MultiheadAttention(8, 2)), head_count(nn.Linear(1, 1))
        (('num_heads', 2), None)
    """
    for name in _COUNTS:
        value: Any = getattr(module, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 1:
            return name, value
    return None


def set_heads(module: nn.Module, before: int, after: int, width: int) -> None:
    """Writes a new number of heads wherever a module of attention keeps it, and the width of all heads together."""
    for name in _COUNTS:
        if getattr(module, name, None) == before:
            setattr(module, name, after)
    for name in _WIDTHS:
        if getattr(module, name, None) == before * width:
            setattr(module, name, after * width)
