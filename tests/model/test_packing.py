import pytest
import torch

from model.config import NextDiTConfig
from model.packing import Layout, RotaryTables, Run

CPU = torch.device("cpu")
CONFIG = NextDiTConfig(
    hidden_size=64,
    num_attention_heads=2,
    num_kv_heads=1,
    axes_dim_rope=(8, 12, 12),
    axes_lens=(20, 6, 5),
)


@pytest.mark.parametrize(
    ("lengths", "runs"),
    [
        ([5], [(0, 1, 5)]),
        ([5, 5, 5], [(0, 3, 5)]),
        ([2, 2, 3, 2], [(0, 2, 2), (4, 1, 3), (7, 1, 2)]),
    ],
)
def test_equal_neighbours_are_one_run(lengths, runs):
    layout = Layout.of(lengths)
    assert layout.runs == tuple(Run(*run) for run in runs)
    assert layout.lengths == tuple(lengths)
    assert layout.num_tokens == layout.runs[-1].stop == sum(lengths)
    assert layout.max_length == max(lengths)
    assert type(layout.max_length) is int


def test_ragged_kernels_get_the_starts_of_the_sequences():
    layout = Layout.of([2, 1, 3, 3])
    assert layout.cu_seqlens.tolist() == [0, 2, 3, 6, 9]
    assert layout.cu_seqlens.dtype == torch.int32
    assert Layout.of([2, 1], "meta").cu_seqlens.device.type == "meta"


def test_sequence_index_names_the_sequence_of_every_token():
    index = Layout.of([2, 1, 3, 3]).sequence_index()
    assert index.tolist() == [0, 0, 1, 2, 2, 2, 3, 3, 3]
    assert index.dtype == torch.int64


def angles(position, dim):
    """Rotary angles of one axis, pair by pair."""
    return [position * 10_000 ** (-2 * j / dim) for j in range(dim // 2)]


def expected(positions):
    rows = [
        [a for p, dim in zip(row, (8, 12, 12), strict=True) for a in angles(p, dim)]
        for row in positions
    ]
    table = torch.tensor(rows, dtype=torch.float64)
    return table.cos().float(), table.sin().float()


def test_caption_tokens_count_on_the_first_axis():
    tables = RotaryTables(CONFIG).caption(19, CPU)
    torch.testing.assert_close(tables, expected([(k, 0, 0) for k in range(19)]), atol=1e-7, rtol=0)


def test_image_tokens_stand_one_after_the_caption_row_by_row():
    tables = RotaryTables(CONFIG).image(7, 3, 5, CPU)
    places = [(7, row, column) for row in range(3) for column in range(5)]
    torch.testing.assert_close(tables, expected(places), atol=1e-7, rtol=0)
    assert {x.dtype for x in tables} == {torch.float32}


def test_tables_are_those_of_diffusers():
    from diffusers.models.transformers.transformer_lumina2 import Lumina2RotaryPosEmbed

    theirs = Lumina2RotaryPosEmbed(10_000, (8, 12, 12), (20, 6, 5), patch_size=2)
    hidden = torch.zeros(1, 4, 6, 10)
    _, caption, image, *_ = theirs(hidden, torch.ones(1, 7, dtype=torch.bool))
    ours = RotaryTables(CONFIG)
    for factors, (cos, sin) in ((caption, ours.caption(7, CPU)), (image, ours.image(7, 3, 5, CPU))):
        factors = factors[0].to(torch.complex128)
        torch.testing.assert_close(torch.complex(cos, sin).to(factors.dtype), factors)


def test_tables_are_computed_once_and_serve_training():
    tables = RotaryTables(CONFIG)
    with torch.inference_mode():
        first = tables.image(3, 2, 2, CPU)
    assert tables.image(3, 2, 2, CPU)[0] is first[0]
    weight = torch.ones(first[0].shape, requires_grad=True)
    (weight * first[0]).sum().backward()
    assert torch.equal(weight.grad, first[0])


def test_captions_share_one_table():
    tables = RotaryTables(CONFIG)
    with torch.inference_mode():
        short, long = tables.caption(2, CPU)[0], tables.caption(19, CPU)[0]
    assert short.data_ptr() == long.data_ptr()
    weight = torch.ones(long.shape, requires_grad=True)
    (weight * long).sum().backward()
    assert torch.equal(weight.grad, long)


def test_the_cache_of_tables_is_bounded_by_bytes():
    one = 2 * 6 * 5 * 16 * 4  # cos and sin, tokens, pairs, bytes
    tables = RotaryTables(CONFIG, cache_bytes=3 * one)
    first = tables.image(1, 6, 5, CPU)
    for caption in range(2, 19):
        tables.image(caption, 6, 5, CPU)
        assert tables.cache.num_bytes <= 3 * one
    assert len(tables.cache) == 3
    again = tables.image(1, 6, 5, CPU)
    assert again[0] is not first[0]
    assert torch.equal(again[0], first[0])
    assert torch.equal(again[1], first[1])


def test_what_was_used_last_stays_in_the_cache():
    one = 2 * 6 * 5 * 16 * 4
    tables = RotaryTables(CONFIG, cache_bytes=2 * one)
    first, _ = tables.image(1, 6, 5, CPU), tables.image(2, 6, 5, CPU)
    assert tables.image(1, 6, 5, CPU)[0] is first[0]
    tables.image(3, 6, 5, CPU)
    assert tables.image(1, 6, 5, CPU)[0] is first[0]


def test_a_table_larger_than_the_cache_is_still_kept_for_the_next_step():
    tables = RotaryTables(CONFIG, cache_bytes=1)
    first = tables.image(1, 6, 5, CPU)
    assert tables.image(1, 6, 5, CPU)[0] is first[0]
    assert len(tables.cache) == 1


@pytest.mark.parametrize("length", [0, 20])
def test_captions_beyond_the_table_are_refused(length):
    with pytest.raises(ValueError, match=rf"caption of {length} tokens is outside 1\.\.19"):
        RotaryTables(CONFIG).caption(length, CPU)


@pytest.mark.parametrize(("rows", "columns"), [(7, 1), (1, 6)])
def test_images_beyond_the_table_are_refused(rows, columns):
    with pytest.raises(ValueError, match=rf"{rows} x {columns} tokens exceeds 6 x 5"):
        RotaryTables(CONFIG).image(1, rows, columns, CPU)
