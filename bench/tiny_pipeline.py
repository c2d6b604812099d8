"""Small AnyFlow pipelines of real diffusers classes with weights from a fixed seed: for the demo, benches and tests.

The VAE, text encoder and transformer are the classes of the released models at small sizes. The weights are random,
so the pictures are noise; what they show is that two runtimes compute the same thing.
"""

from __future__ import annotations

from typing import Any

import torch


def tiny_tokenizer(vocabulary: int = 256) -> Any:
    """A byte-level tokenizer with UMT5's special tokens, made without a download."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = ["<pad>", "</s>", "<unk>", *alphabet][:vocabulary]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def tiny_pipeline(
    causal: bool = True,
    heads: int = 4,
    head_dim: int = 64,
    layers: int = 4,
    ffn_dim: int | None = None,
    text_dim: int = 64,
    vae_dim: int = 8,
    seed: int = 0,
    **transformer: Any,
) -> Any:
    """A diffusers `AnyFlowFARPipeline` (or `AnyFlowPipeline`) with random weights.

    Args:
        causal: FAR, else bidirectional.
        heads, head_dim, layers, ffn_dim: of the transformer; ffn_dim defaults to 4 x width.
        text_dim: width of the text encoder.
        vae_dim: base width of the VAE.
        transformer: further constructor keywords of the transformer.
    """
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    torch.manual_seed(seed)
    vae = diffusers.AutoencoderKLWan(base_dim=vae_dim, z_dim=16, dim_mult=[1, 2, 2, 2], num_res_blocks=1)
    text_config = UMT5Config(vocab_size=320, d_model=text_dim, d_kv=16, d_ff=2 * text_dim, num_layers=2, num_heads=4)
    name = "AnyFlowFARTransformer3DModel" if causal else "AnyFlowTransformer3DModel"
    model = getattr(diffusers, name)(
        num_attention_heads=heads,
        attention_head_dim=head_dim,
        num_layers=layers,
        ffn_dim=ffn_dim or 4 * heads * head_dim,
        text_dim=text_dim,
        **transformer,
    )
    pipeline = diffusers.AnyFlowFARPipeline if causal else diffusers.AnyFlowPipeline
    pipe = pipeline(
        tokenizer=tiny_tokenizer(),
        text_encoder=UMT5EncoderModel(text_config).eval(),
        transformer=model.eval(),
        vae=vae.eval(),
        scheduler=diffusers.FlowMapEulerDiscreteScheduler(shift=5.0),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe
