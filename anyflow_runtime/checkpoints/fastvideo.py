"""FastVideo's key layout: pure renames of the diffusers keys, lossless both ways.

Source: FastVideo's `WanVideoArchConfig.param_names_mapping` (pull request 1371). The delta embedder is renamed like the
time embedder; that rule was inferred from the class, not read.
"""

from __future__ import annotations

from .renames import Report, Rule, State, rename_all

_PARTS = {
    "n": r"\d+",
    "own": "to_[qkv]|norm_[qk]",
    "which": "time|delta",
    "values": "weight|bias",
    "rest": r"(?!0\.).+",  # the 0 of to_out.0 is no parameter, but diffusers' layout
}
_NAMES = (  # in diffusers and in FastVideo
    ("patch_embedding.{values}", "patch_embedding.proj.{values}"),
    ("condition_embedder.text_embedder.linear_1.{rest}", "condition_embedder.text_embedder.fc_in.{rest}"),
    ("condition_embedder.text_embedder.linear_2.{rest}", "condition_embedder.text_embedder.fc_out.{rest}"),
    ("condition_embedder.image_embedder.ff.net.0.proj.{rest}", "condition_embedder.image_embedder.ff.fc_in.{rest}"),
    ("condition_embedder.image_embedder.ff.net.2.{rest}", "condition_embedder.image_embedder.ff.fc_out.{rest}"),
    ("condition_embedder.{which}_embedder.linear_1.{rest}", "condition_embedder.{which}_embedder.mlp.fc_in.{rest}"),
    ("condition_embedder.{which}_embedder.linear_2.{rest}", "condition_embedder.{which}_embedder.mlp.fc_out.{rest}"),
    ("condition_embedder.time_proj.{rest}", "condition_embedder.time_modulation.linear.{rest}"),
    ("blocks.{n}.attn1.{own}.{rest}", "blocks.{n}.{own}.{rest}"),
    ("blocks.{n}.attn1.to_out.0.{rest}", "blocks.{n}.to_out.{rest}"),
    ("blocks.{n}.attn2.to_out.0.{rest}", "blocks.{n}.attn2.to_out.{rest}"),
    ("blocks.{n}.ffn.net.0.proj.{rest}", "blocks.{n}.ffn.fc_in.{rest}"),
    ("blocks.{n}.ffn.net.2.{rest}", "blocks.{n}.ffn.fc_out.{rest}"),
    ("blocks.{n}.norm2.{rest}", "blocks.{n}.self_attn_residual_norm.norm.{rest}"),
)


def _rule(old: str, new: str) -> Rule:
    groups = {name: f"(?P<{name}>{pattern})" for name, pattern in _PARTS.items()}
    return Rule(old.replace(".", r"\.").format(**groups), new.format(**{name: rf"\g<{name}>" for name in _PARTS}))


TO_FASTVIDEO = tuple(_rule(diffusers, fastvideo) for diffusers, fastvideo in _NAMES)
FROM_FASTVIDEO = tuple(_rule(fastvideo, diffusers) for diffusers, fastvideo in _NAMES)


def to_fastvideo(state: State) -> tuple[State, Report]:
    """FastVideo's layout of a diffusers state dict; the *same object* if no key has another name there.

    Raises:
        ValueError: if keys of both layouts are present.
    """
    return _convert(state, TO_FASTVIDEO, FROM_FASTVIDEO)


def from_fastvideo(state: State) -> tuple[State, Report]:
    """The diffusers layout of a FastVideo state dict; the *same object* if no key has another name there.

    Raises:
        ValueError: if keys of both layouts are present.
    """
    return _convert(state, FROM_FASTVIDEO, TO_FASTVIDEO)


def _convert(state: State, rules: tuple[Rule, ...], inverse: tuple[Rule, ...]) -> tuple[State, Report]:
    renamed, report = rename_all(state, rules)
    if not report.renamed:
        return state, Report()
    _, other = rename_all(state, inverse)
    if other.renamed:
        raise ValueError(
            f"state: got both {report.renamed[0][0]!r} and {other.renamed[0][0]!r}, expected the keys of one layout"
        )
    return renamed, report
