"""A prompt's keys and values for cross-attention: computed once, and held where captured steps read them."""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from anyflow_kernels import Ops

from .parameters import apply_linear, onloaded


class CrossAttentionKeys(Protocol):
    """What the blocks ask of a prompt."""

    def tokens(self) -> Tensor:
        """(B, S_image + S, D)."""
        ...

    def keys_values(self, layer: int, attn: Any, ops: Ops) -> tuple[Tensor, Tensor]:
        """Normed keys and values, each (B, S, H, d), for the cross-attention of a block."""
        ...


class Seen:
    """A tensor as it was at one time, known by its object and its count of changes in place.

    Tensors made in inference mode count none, and are never known again.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor
        self._version = None if tensor.is_inference() else tensor._version

    def is_still(self, other: Seen) -> bool:
        """Whether both are the same tensor with the same values, as far as that is known without reading it."""
        return self._tensor is other._tensor and self._version == other._version is not None

    def equals(self, x: Tensor) -> bool:
        """Whether x has the values this was seen with; False if they are gone. Waits for the device."""
        if self._version is not None and self._tensor._version != self._version:
            return False
        return self._tensor.shape == x.shape and self._tensor.dtype == x.dtype and torch.equal(self._tensor, x)


class PromptKeys:
    """A prompt's tokens, and per block their keys and values: computed at first use, kept while no gradient is wanted.

    Args:
        embedder: a condition embedder, ours or diffusers'.
        text: (B, S, text_dim) text embeddings.
        image: (B, S_image, image_dim) image embeddings or None; they stand before the text.
    """

    def __init__(self, embedder: Any, text: Tensor, image: Tensor | None = None) -> None:
        if image is not None and embedder.image_embedder is None:
            raise ValueError("encoder_hidden_states_image: got a tensor, expected None for a model without image_dim")
        # A tensor made in inference mode does not count its changes: compare with a copy.
        self.text, self.image = (x.clone() if x is not None and x.is_inference() else x for x in (text, image))
        self._seen = tuple(None if x is None else Seen(x) for x in (self.text, self.image))
        self._embedder = embedder
        self._tokens: Tensor | None = None
        self._kept: dict[int, tuple[Tensor, Tensor]] = {}

    def matches(self, text: Tensor, image: Tensor | None, compare: bool = True) -> bool:
        """True if these are the embeddings this object was made from: the same tensors or, with `compare`, equal."""
        given = (text, image)
        if any((seen is None) != (x is None) for seen, x in zip(self._seen, given, strict=True)):
            return False
        pairs = [(seen, x) for seen, x in zip(self._seen, given, strict=True) if seen is not None and x is not None]
        if all(seen.is_still(Seen(x)) for seen, x in pairs):
            return True
        return compare and all(seen.equals(x) for seen, x in pairs)

    def tokens(self) -> Tensor:
        """(B, S_image + S, D)."""
        if self._tokens is None:
            tokens = self._embedder.text_embedder(self.text)
            if self.image is not None:
                tokens = torch.cat([self._embedder.image_embedder(self.image), tokens], dim=1)
            self._tokens = tokens
        return self._tokens

    def keys_values(self, layer: int, attn: Any, ops: Ops) -> tuple[Tensor, Tensor]:
        """Normed keys and values, each (B, S, H, d), for the cross-attention of a block."""
        if layer in self._kept and not torch.is_grad_enabled():
            return self._kept[layer]
        tokens = self.tokens()
        with onloaded(attn.norm_k):
            k = ops.rms_norm(apply_linear(ops, attn.to_k, tokens), attn.norm_k.weight, attn.norm_k.eps).unflatten(
                -1, (attn.heads, -1)
            )
        v = apply_linear(ops, attn.to_v, tokens).unflatten(-1, (attn.heads, -1))
        if not torch.is_grad_enabled():
            self._kept[layer] = (k, v)
        return k, v


class KeysOfOneBlock:
    """Keys and values for one block, computed outside it: a compiled block is one graph for all layers."""

    def __init__(self, source: CrossAttentionKeys, layer: int, attn: Any, ops: Ops) -> None:
        self._source = source
        self._kept = source.keys_values(layer, attn, ops)

    def tokens(self) -> Tensor:
        """As `PromptKeys.tokens`."""
        return self._source.tokens()

    def keys_values(self, layer: int, attn: Any, ops: Ops) -> tuple[Tensor, Tensor]:
        """As `PromptKeys.keys_values`."""
        return self._kept


class PromptBuffers:
    """Keys and values of the present prompt at addresses that stay, for captured steps to read.

    Args:
        keys: the first prompt.
        blocks: of the model.
        ops: the kernels that compute a prompt's keys.
    """

    def __init__(self, keys: PromptKeys, blocks: Any, ops: Ops) -> None:
        self._source = keys
        self._kept = [(k.clone(), v.clone()) for k, v in _keys_values(keys, blocks, ops)]

    def take(self, keys: PromptKeys, blocks: Any, ops: Ops) -> bool:
        """Hold this prompt from now on; False if it does not fit, as with another number of tokens."""
        if keys is self._source:
            return True
        computed = _keys_values(keys, blocks, ops)
        if [k.shape for k, _ in computed] != [k.shape for k, _ in self._kept]:
            return False
        for kept, new in zip(self._kept, computed, strict=True):
            kept[0].copy_(new[0])
            kept[1].copy_(new[1])
        self._source = keys
        return True

    def tokens(self) -> Tensor:
        """As `PromptKeys.tokens`."""
        return self._source.tokens()

    def keys_values(self, layer: int, attn: Any, ops: Ops) -> tuple[Tensor, Tensor]:
        """As `PromptKeys.keys_values`."""
        return self._kept[layer]


def _keys_values(keys: PromptKeys, blocks: Any, ops: Ops) -> list[tuple[Tensor, Tensor]]:
    return [keys.keys_values(layer, block.attn2, ops) for layer, block in enumerate(blocks)]
