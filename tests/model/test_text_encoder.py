import pytest
import torch
from transformers import Gemma2Model

from model.templates import compose_prompt
from model.text_encoder import TextEncoder

TEXTS = ["a red circle above a blue square", "", "x", compose_prompt("a green star", "real")]
LONG = "a red circle and " * 40


@pytest.fixture(scope="module")
def encoder(pipeline) -> TextEncoder:
    return pipeline.text_encoder


@pytest.fixture(scope="module")
def full_gemma(tiny_folder):
    return Gemma2Model.from_pretrained(
        tiny_folder / "text_encoder", attn_implementation="eager"
    ).eval()


@torch.no_grad()
def full_features(gemma, tokenizer, text: str, padding: bool) -> torch.Tensor:
    """hidden_states[-2] of the whole model, valid tokens only."""
    options = {"padding": "max_length", "max_length": 256} if padding else {}
    inputs = tokenizer(text, return_tensors="pt", truncation=padding, **options)
    hidden = gemma(**inputs, output_hidden_states=True).hidden_states[-2][0]
    return hidden[inputs.attention_mask[0].bool()]


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("padding", [False, True])
def test_features_are_the_last_but_one_hidden_state(encoder, full_gemma, text, padding):
    (features,) = encoder.encode([text])
    expected = full_features(full_gemma, encoder.tokenizer, text, padding)
    assert features.shape == expected.shape
    torch.testing.assert_close(features, expected, atol=1e-5, rtol=1e-5)


def test_last_layer_is_not_kept(encoder, full_gemma):
    assert len(encoder.model.layers) == len(full_gemma.layers) - 1


def test_soft_cap_is_honoured(encoder, tiny_folder):
    uncapped = Gemma2Model.from_pretrained(
        tiny_folder / "text_encoder", attn_implementation="eager", attn_logit_softcapping=None
    ).eval()
    (features,) = encoder.encode([TEXTS[0]])
    without = full_features(uncapped, encoder.tokenizer, TEXTS[0], padding=False)
    assert (features - without).norm() / features.norm() > 0.01


def test_neighbours_do_not_matter(pipeline):
    alone = TextEncoder(pipeline.text_encoder.tokenizer, pipeline.text_encoder.model)
    crowd = TextEncoder(pipeline.text_encoder.tokenizer, pipeline.text_encoder.model)
    together = crowd.encode(TEXTS)
    for text, features in zip(TEXTS, together, strict=True):
        assert torch.equal(alone.encode([text])[0], features)


def test_empty_text_is_the_bare_beginning_of_sequence(encoder):
    assert encoder.encode([""])[0].shape == (1, encoder.feature_dim)


def test_long_text_is_cut_on_the_right(encoder):
    tokens = len(encoder.tokenizer(LONG)["input_ids"])
    assert tokens > 256
    (features,) = encoder.encode([LONG])
    assert features.shape[0] == 256
    assert encoder.count_tokens(LONG) == tokens
    dropped = encoder.dropped(LONG)
    assert LONG.endswith(dropped)
    assert encoder.count_tokens(LONG.removesuffix(dropped)) == 256
    assert encoder.dropped("a red circle") == ""
    assert encoder.dropped(LONG.removesuffix(dropped)) == ""
    (other,) = encoder.encode([LONG + " something else at the end"])
    assert torch.equal(features, other)


def test_cache_returns_the_same_and_stays_bounded(pipeline):
    inner = pipeline.text_encoder
    encoder = TextEncoder(inner.tokenizer, inner.model, cache_bytes=4 * 32 * 4 * 3)
    first = encoder.encode(["abc"])[0]
    assert encoder.encode(["abc"])[0] is first
    for letter in "defghij":
        encoder.encode([letter * 3])
        assert sum(features.nbytes for features in encoder._cache.values()) <= 4 * 32 * 4 * 3
    assert encoder.encode(["abc"])[0] is not first
    assert torch.equal(encoder.encode(["abc"])[0], first)


def test_features_can_train_a_network(pipeline):
    encoder = TextEncoder(pipeline.text_encoder.tokenizer, pipeline.text_encoder.model)
    with torch.inference_mode():
        (features,) = encoder.encode(["a red circle"])
    weight = torch.ones(features.shape[1], requires_grad=True)
    (features * weight).sum().backward()
    assert weight.grad is not None


# One character may be several tokens of a byte-fallback tokenizer: it is dropped whole.
@pytest.mark.parametrize("padding", range(4))
def test_a_character_on_the_limit_is_dropped_whole(encoder, padding):
    text = "x" * (252 + padding) + "猫と鳥"
    assert encoder.count_tokens(text) > 256
    assert encoder.dropped(text) in ("猫と鳥", "と鳥")
