import numpy as np
import pytest
from PIL import Image

from trainer.data.buckets import aspect_buckets, fit, nearest_bucket


def brute_force(tokens: int) -> set[tuple[int, int]]:
    """Grids of the staircase by its definition: each is one step from the largest of its width."""
    best = {w: tokens // w for w in range(1, tokens + 1)}
    walk = set()
    for w, h in best.items():
        lower = best.get(w + 1, 0)
        walk |= {(w, k) for k in range(max(lower, 1), h + 1)}
    return {
        (16 * w, 16 * h)
        for w, h in walk
        if max(w, h) <= 4 * min(w, h) and w % 4 in (0, 1) and h % 4 in (0, 1)
    }


def test_there_are_the_51_buckets_of_1024_px():
    buckets = aspect_buckets(1024)
    assert len(buckets) == len(set(buckets)) == 51
    assert set(buckets) == brute_force(4096)
    assert sum(any(side % 64 for side in size) for size in buckets) == 34
    assert (1024, 1024) in buckets
    assert (2048, 512) in buckets
    for width, height in buckets:
        assert width * height <= 1024**2
        assert {width % 64, height % 64} <= {0, 16}
        # What is left of the latents after pooling still makes whole patches.
        assert (width // 8 // 4) % 2 == (height // 8 // 4) % 2 == 0


@pytest.mark.parametrize("resolution", [64, 256, 512])
def test_other_resolutions_follow_the_same_rule(resolution):
    assert set(aspect_buckets(resolution)) == brute_force((resolution // 16) ** 2)


@pytest.mark.parametrize("resolution", [0, 100, 32])
def test_a_resolution_that_has_none_is_refused(resolution):
    with pytest.raises(ValueError, match=f"resolution {resolution} must be a multiple of 64"):
        aspect_buckets(resolution)


@pytest.mark.parametrize(
    ("size", "expected"),
    [((1000, 1000), (1024, 1024)), ((9000, 1000), (2048, 512)), ((300, 1000), (576, 1808))],
)
def test_the_nearest_aspect_is_chosen(size, expected):
    buckets = aspect_buckets(1024)
    chosen = nearest_bucket(*size, buckets)
    logs = {b: abs(np.log(b[0] / b[1]) - np.log(size[0] / size[1])) for b in buckets}
    assert logs[chosen] == min(logs.values())
    if expected[0] != 576:
        assert chosen == expected


def test_a_picture_is_scaled_to_cover_and_cropped_in_the_middle():
    picture = np.zeros((400, 900, 3), np.uint8)
    picture[:, 300:600] = 255  # a white band in the middle third
    found = np.asarray(fit(Image.fromarray(picture), (128, 128)))
    assert found.shape == (128, 128, 3)
    assert found[64].mean() > 180
    assert (found[:, 64] > 250).all()
    assert (found[:, :8] < 30).all()


def test_a_small_picture_is_enlarged():
    flat = Image.new("RGB", (10, 30), (9, 99, 199))
    found = np.asarray(fit(flat, (64, 128)))
    assert found.shape == (128, 64, 3)
    assert (found == (9, 99, 199)).all()


def test_transparency_becomes_white_and_other_modes_rgb():
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert np.asarray(fit(clear, (64, 64))).min() == 255
    for mode in ("L", "P", "RGB", "LA"):
        assert fit(Image.new(mode, (64, 64)), (64, 64)).mode == "RGB"
    with pytest.raises(ValueError, match="colour mode CMYK is not supported"):
        fit(Image.new("CMYK", (64, 64)), (64, 64))
