"""A tiny checkpoint folder with random weights, written by diffusers and transformers themselves.

Because the reference libraries write it, a test that loads it also checks that we read what they
save. Weights are seeded, non-zero everywhere and loud enough that prompts, guidance and steps all
move pixels: an image made from it is noise, but never a grey field that any bug would match.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path

TINY_SIZE = 64
TINY_SHIFT = 6.0
_SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
_MERGES = (("t", "h"), ("th", "e"), ("r", "e"), ("re", "d"), ("a", "▁"), ("i", "n"), ("in", "g"))


def make_tiny_checkpoint(folder: Path | str, seed: int = 0, sample_size: int = TINY_SIZE) -> Path:
    """Write a complete pipeline folder (about 1 MB, 64 px default size) and return its path."""
    import torch
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, Lumina2Pipeline

    folder = Path(folder)
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 4,
            up_block_types=["UpDecoderBlock2D"] * 4,
            block_out_channels=[8, 8, 16, 16],
            layers_per_block=1,
            norm_num_groups=4,
            latent_channels=16,
            sample_size=sample_size,
            scaling_factor=0.3611,
            shift_factor=0.1159,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
        vae.decoder.conv_out.weight.data.mul_(2.5)  # loud pixels: full range instead of grey
        pipeline = Lumina2Pipeline(
            transformer=_transformer(sample_size // 8),
            scheduler=FlowMatchEulerDiscreteScheduler(shift=TINY_SHIFT),
            vae=vae,
            text_encoder=_text_encoder(),
            tokenizer=tiny_tokenizer(),
        )
        pipeline.save_pretrained(folder)
    return folder


def write_generation_config(folder: Path | str, **sections: object) -> Path:
    """Write `generation_config.json` beside `model_index.json` and return its path."""
    path = Path(folder) / "generation_config.json"
    path.write_text(json.dumps(sections), encoding="utf-8")
    return path


def tiny_tokenizer():
    """A byte-fallback Gemma tokenizer over printable ASCII with its own BOS rule."""
    from transformers import GemmaTokenizer

    tokens = [*_SPECIAL_TOKENS, *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += ["▁", *(chr(code) for code in range(33, 127))]
    tokens += ["".join(pair) for pair in _MERGES]
    return GemmaTokenizer(
        vocab={token: index for index, token in enumerate(tokens)},
        merges=list(_MERGES),
        add_bos_token=True,
        padding_side="right",
    )


def _text_encoder():
    from transformers import Gemma2Config, Gemma2Model

    config = Gemma2Config(
        vocab_size=len(tiny_tokenizer()),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        query_pre_attn_scalar=8,
        initializer_range=0.3,
        attn_logit_softcapping=2.0,  # small, so that ignoring the cap moves the features
        max_position_embeddings=512,
    )
    return Gemma2Model(config)


def _transformer(sample_size: int):
    import torch
    from diffusers import Lumina2Transformer2DModel

    transformer = Lumina2Transformer2DModel(
        sample_size=sample_size,
        in_channels=16,
        hidden_size=48,
        num_layers=2,
        num_refiner_layers=1,
        num_attention_heads=4,
        num_kv_heads=2,
        multiple_of=16,
        axes_dim_rope=(4, 4, 4),
        axes_lens=(300, 512, 512),
        cap_feat_dim=32,
    )
    for name, parameter in transformer.named_parameters():
        if "norm_q" in name or "norm_k" in name:
            parameter.data.mul_(2.0)  # sharp attention: single words move pixels
        elif parameter.dim() == 1:
            parameter.data.add_(torch.randn_like(parameter) * 0.1)
        else:
            parameter.data.mul_(1.5)
    return transformer
