"""An optional adversarial term on the features of a frozen score network; off unless asked for.

The noised clip passes through the network, tokens leaving chosen blocks are pooled and turned into one logit per block.
Source: DMD2 (arXiv 2405.14867); approximate R1: APT (arXiv 2501.08316).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from .velocity import Velocity


def generator_gan_loss(fake_logits: torch.Tensor) -> torch.Tensor:
    """mean softplus(-f) over logits (B, K)."""
    return F.softplus(-fake_logits).mean()


def discriminator_gan_loss(real_logits: torch.Tensor, fake_logits: torch.Tensor) -> torch.Tensor:
    """mean softplus(f) + mean softplus(-r) over logits (B, K)."""
    return F.softplus(fake_logits).mean() + F.softplus(-real_logits).mean()


def approximate_r1(logits: torch.Tensor, perturbed_logits: torch.Tensor) -> torch.Tensor:
    """mse of the logits of real samples and of slightly noised ones: an R1 penalty without double backward."""
    return F.mse_loss(perturbed_logits, logits)


class BlockFeatures:
    """The residual stream (B, L, D) at the end of chosen blocks of a transformer during one forward.

    Args:
        model: has `blocks`, a ModuleList whose outputs are tokens or tuples that begin with tokens. Blocks that defer
            their last gated residual to the next one give the stream before that residual.
        blocks: indices, negative ones counted from the end.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[int]) -> None:
        modules: Any = model.blocks
        if not blocks or any(not -len(modules) <= i < len(modules) for i in blocks):
            raise ValueError(f"blocks: got {tuple(blocks)}, expected indices of the {len(modules)} blocks")
        self._chosen = [modules[i] for i in blocks]

    def __call__(
        self, velocity: Velocity, x_t: torch.Tensor, t: torch.Tensor, text: torch.Tensor
    ) -> list[torch.Tensor]:
        """Features of `velocity(x_t, t, t, text)`, in the order of `blocks`; gradient flows back to x_t."""
        features: dict[int, torch.Tensor] = {}

        def keep(position: int) -> Any:
            def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
                features[position] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [block.register_forward_hook(keep(i)) for i, block in enumerate(self._chosen)]
        try:
            velocity(x_t, t, t, text)
        finally:
            for handle in handles:
                handle.remove()
        return [features[i] for i in range(len(self._chosen))]


class DiscriminatorHeads(nn.Module):
    """One small head per block: LayerNorm, mean and maximum over tokens, linear-SiLU-linear to a logit.

    Args:
        dim: width of the tokens.  num_heads: number of blocks.  hidden: width inside a head.
    """

    def __init__(self, dim: int, num_heads: int, hidden: int = 256) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(num_heads))
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(2 * dim, hidden), nn.SiLU(), nn.Linear(hidden, 1)) for _ in range(num_heads)
        )

    def forward(self, features: Sequence[torch.Tensor]) -> torch.Tensor:
        """Logits (B, num_heads) of features (B, L, dim) per block."""
        if len(features) != len(self.heads):
            raise ValueError(f"features: got {len(features)} tensors, expected {len(self.heads)}, one per head")
        logits = []
        for feature, norm, head in zip(features, self.norms, self.heads, strict=True):
            tokens = norm(feature.float())
            logits.append(head(torch.cat([tokens.mean(1), tokens.amax(1)], dim=-1)))
        return torch.cat(logits, dim=-1)
