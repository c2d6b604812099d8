"""FastVideo's key layout: pure renames of the diffusers keys, lossless both ways.

Source: FastVideo's `WanVideoArchConfig.param_names_mapping` (pull request 1371). The delta embedder is renamed like the
time embedder; that rule was inferred from the class, not read.
"""

from __future__ import annotations

from .renames import Report, Rule, State, rename_all

_BLOCK = r"blocks\.(\d+)\."
_FORWARD: tuple[tuple[str, str], ...] = (
    (r"patch_embedding\.(weight|bias)", r"patch_embedding.proj.\1"),
    (r"condition_embedder\.text_embedder\.linear_1\.(.+)", r"condition_embedder.text_embedder.fc_in.\1"),
    (r"condition_embedder\.text_embedder\.linear_2\.(.+)", r"condition_embedder.text_embedder.fc_out.\1"),
    (r"condition_embedder\.(time|delta)_embedder\.linear_1\.(.+)", r"condition_embedder.\1_embedder.mlp.fc_in.\2"),
    (r"condition_embedder\.(time|delta)_embedder\.linear_2\.(.+)", r"condition_embedder.\1_embedder.mlp.fc_out.\2"),
    (r"condition_embedder\.time_proj\.(.+)", r"condition_embedder.time_modulation.linear.\1"),
    (_BLOCK + r"attn1\.(to_[qkv])\.(.+)", r"blocks.\1.\2.\3"),
    (_BLOCK + r"attn1\.to_out\.0\.(.+)", r"blocks.\1.to_out.\2"),
    (_BLOCK + r"attn1\.(norm_[qk])\.(.+)", r"blocks.\1.\2.\3"),
    (_BLOCK + r"attn2\.to_out\.0\.(.+)", r"blocks.\1.attn2.to_out.\2"),
    (_BLOCK + r"ffn\.net\.0\.proj\.(.+)", r"blocks.\1.ffn.fc_in.\2"),
    (_BLOCK + r"ffn\.net\.2\.(.+)", r"blocks.\1.ffn.fc_out.\2"),
    (_BLOCK + r"norm2\.(.+)", r"blocks.\1.self_attn_residual_norm.norm.\2"),
)
_BACKWARD: tuple[tuple[str, str], ...] = (
    (r"patch_embedding\.proj\.(weight|bias)", r"patch_embedding.\1"),
    (r"condition_embedder\.text_embedder\.fc_in\.(.+)", r"condition_embedder.text_embedder.linear_1.\1"),
    (r"condition_embedder\.text_embedder\.fc_out\.(.+)", r"condition_embedder.text_embedder.linear_2.\1"),
    (r"condition_embedder\.(time|delta)_embedder\.mlp\.fc_in\.(.+)", r"condition_embedder.\1_embedder.linear_1.\2"),
    (r"condition_embedder\.(time|delta)_embedder\.mlp\.fc_out\.(.+)", r"condition_embedder.\1_embedder.linear_2.\2"),
    (r"condition_embedder\.time_modulation\.linear\.(.+)", r"condition_embedder.time_proj.\1"),
    (_BLOCK + r"(to_[qkv])\.(.+)", r"blocks.\1.attn1.\2.\3"),
    (_BLOCK + r"to_out\.(weight|bias)", r"blocks.\1.attn1.to_out.0.\2"),
    (_BLOCK + r"(norm_[qk])\.(.+)", r"blocks.\1.attn1.\2.\3"),
    (_BLOCK + r"attn2\.to_out\.(weight|bias)", r"blocks.\1.attn2.to_out.0.\2"),
    (_BLOCK + r"ffn\.fc_in\.(.+)", r"blocks.\1.ffn.net.0.proj.\2"),
    (_BLOCK + r"ffn\.fc_out\.(.+)", r"blocks.\1.ffn.net.2.\2"),
    (_BLOCK + r"self_attn_residual_norm\.norm\.(.+)", r"blocks.\1.norm2.\2"),
)
TO_FASTVIDEO = tuple(Rule(*pair) for pair in _FORWARD)
FROM_FASTVIDEO = tuple(Rule(*pair) for pair in _BACKWARD)


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
