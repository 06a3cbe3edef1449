"""Official weights made of diffusers' weights, by a table of its own: the published names.

Independent of `model/dialects.py` on purpose, so that a slip there cannot hide here.
"""

import torch

TOP = {
    "x_embedder.weight": "x_embedder.weight",
    "x_embedder.bias": "x_embedder.bias",
    "t_embedder.mlp.0.weight": "time_caption_embed.timestep_embedder.linear_1.weight",
    "t_embedder.mlp.0.bias": "time_caption_embed.timestep_embedder.linear_1.bias",
    "t_embedder.mlp.2.weight": "time_caption_embed.timestep_embedder.linear_2.weight",
    "t_embedder.mlp.2.bias": "time_caption_embed.timestep_embedder.linear_2.bias",
    "cap_embedder.0.weight": "time_caption_embed.caption_embedder.0.weight",
    "cap_embedder.1.weight": "time_caption_embed.caption_embedder.1.weight",
    "cap_embedder.1.bias": "time_caption_embed.caption_embedder.1.bias",
    "final_layer.adaLN_modulation.1.weight": "norm_out.linear_1.weight",
    "final_layer.adaLN_modulation.1.bias": "norm_out.linear_1.bias",
    "final_layer.linear.weight": "norm_out.linear_2.weight",
    "final_layer.linear.bias": "norm_out.linear_2.bias",
}
PLAIN_BLOCK = {
    "attention.out.weight": "attn.to_out.0.weight",
    "attention.q_norm.weight": "attn.norm_q.weight",
    "attention.k_norm.weight": "attn.norm_k.weight",
    "feed_forward.w1.weight": "feed_forward.linear_1.weight",
    "feed_forward.w2.weight": "feed_forward.linear_2.weight",
    "feed_forward.w3.weight": "feed_forward.linear_3.weight",
    "attention_norm1.weight": "norm1.weight",
    "attention_norm2.weight": "norm2.weight",
    "ffn_norm1.weight": "ffn_norm1.weight",
    "ffn_norm2.weight": "ffn_norm2.weight",
}
MODULATED_BLOCK = {
    **PLAIN_BLOCK,
    "attention_norm1.weight": "norm1.norm.weight",
    "adaLN_modulation.1.weight": "norm1.linear.weight",
    "adaLN_modulation.1.bias": "norm1.linear.bias",
}


def official_state(theirs, prefix=""):
    """The official state dict, `norm_final` included, of diffusers' one."""
    state = {name: theirs[key] for name, key in TOP.items()}
    blocks = sorted({tuple(key.split(".")[:2]) for key in theirs if ".attn.to_q." in key})
    for stem, index in blocks:
        block = f"{stem}.{index}."
        table = PLAIN_BLOCK if stem == "context_refiner" else MODULATED_BLOCK
        state.update({block + name: theirs[block + key] for name, key in table.items()})
        q, k, v = (theirs[f"{block}attn.to_{letter}.weight"] for letter in "qkv")
        state[f"{block}attention.qkv.weight"] = torch.cat([q, k, v])
    assert sum(t.numel() for t in state.values()) == sum(t.numel() for t in theirs.values())
    state["norm_final.weight"] = torch.ones(len(theirs["x_embedder.bias"]))
    return {prefix + name: tensor.clone() for name, tensor in state.items()}
