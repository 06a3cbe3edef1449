"""LoRAs made by peft on diffusers' transformer, and files of other spellings."""

import copy
import json

import torch
from safetensors.torch import save_file

BLOCK_LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0",
    "feed_forward.linear_1", "feed_forward.linear_2", "feed_forward.linear_3", "norm1.linear",
)  # fmt: skip
OTHER_LAYERS = (
    "x_embedder", "timestep_embedder.linear_1", "timestep_embedder.linear_2",
    "caption_embedder.1", "norm_out.linear_1", "norm_out.linear_2",
)  # fmt: skip
ALL_LAYERS = BLOCK_LAYERS + OTHER_LAYERS


def adapt(reference, layers=ALL_LAYERS, seed=0, gain=1.0, name="default", **settings):
    """A copy of diffusers' transformer with a loud random LoRA of peft on the given layers."""
    from peft import LoraConfig

    adapted = copy.deepcopy(reference)
    settings = {"r": 3, "lora_alpha": 5} | settings
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = LoraConfig(target_modules=list(layers), init_lora_weights=False, **settings)
        adapted.add_adapter(config, name)
        for key, parameter in adapted.named_parameters():
            if "lora_" in key and f".{name}." in key:
                parameter.data.normal_(0.0, gain * parameter.shape[1] ** -0.5)
    return adapted.eval()


def pairs_of(adapted, name="default"):
    """peft's state dict of the LoRA, contiguous."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(adapted, adapter_name=name)
    return {key: value.detach().clone().contiguous() for key, value in state.items()}


def save_as_diffusers(adapted, path, metadata=True, name="default"):
    """The file as diffusers' pipeline writes it, by its own function."""
    from diffusers import Lumina2Pipeline

    Lumina2Pipeline.save_lora_weights(
        path.parent,
        transformer_lora_layers=pairs_of(adapted, name),
        weight_name=path.name,
        transformer_lora_adapter_metadata=(
            adapted.peft_config[name].to_dict() if metadata else None
        ),
    )
    return path


def save_with_alphas(adapted, path):
    """The same without metadata: alphas as tensors, in lora_down and lora_up spelling."""
    config = adapted.peft_config["default"]
    state = {}
    for key, value in pairs_of(adapted).items():
        spelt = key.replace("lora_A", "lora_down").replace("lora_B", "lora_up")
        state[f"transformer.{spelt}"] = value
        state[f"transformer.{key.split('.lora_')[0]}.alpha"] = torch.tensor(
            float(config.lora_alpha)
        )
    save_file(state, path)
    return path


def save_as_peft(adapted, folder):
    """What `PeftModel.save_pretrained` leaves: bare settings beside prefixed weights."""
    folder.mkdir()
    path = folder / "adapter_model.safetensors"
    save_file({f"base_model.model.{k}": v for k, v in pairs_of(adapted).items()}, path)
    settings = adapted.peft_config["default"].to_dict()
    plain = {k: v for k, v in settings.items() if isinstance(v, int | float | str | dict | None)}
    (folder / "adapter_config.json").write_text(json.dumps(plain))
    return path
