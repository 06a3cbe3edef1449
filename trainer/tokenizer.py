"""The demo model's tokenizer: Gemma's format, a small vocabulary learned from captions."""

from collections.abc import Iterable
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import GemmaTokenizer

SPACE = "▁"
SPECIAL_TOKENS = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))  # fallback, so that no text is unknown


def train_tokenizer(
    captions: Iterable[str], templates: Iterable[str], vocab_size: int
) -> GemmaTokenizer:
    """Learn a byte-pair vocabulary; every prompt template becomes one token.

    A template would otherwise cost more tokens than the image has at 64 px.

    Args:
        captions: to learn from.
        templates: whole prefixes, marker included, that end where the caption begins.
        vocab_size: of the result, the templates not counted.
    """
    learner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    learner.normalizer = normalizers.Replace(" ", SPACE)
    learner.pre_tokenizer = pre_tokenizers.Split(SPACE, "merged_with_next")
    learner.decoder = decoders.Replace(SPACE, " ")
    # Each caption also with a leading space: a word may open a prompt or follow another.
    texts = (text for caption in captions for text in (caption, f" {caption}"))
    alphabet = [SPACE, *(chr(code) for code in range(33, 127))]
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[*SPECIAL_TOKENS, *BYTES],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    learner.train_from_iterator(texts, trainer)
    model = _model_json(learner)
    tokenizer = GemmaTokenizer(
        vocab=model["vocab"],
        merges=[tuple(pair) for pair in model["merges"]],
        add_bos_token=True,
        padding_side="right",
    )
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in templates])
    return tokenizer


def _model_json(tokenizer: Tokenizer) -> dict[str, Any]:
    import json

    model: dict[str, Any] = json.loads(tokenizer.to_str())["model"]
    return model
