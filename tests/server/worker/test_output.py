import io
import json

import pytest
from PIL import Image

from server.worker.output import encode_image

PARAMETERS = {"prompt": "ein rotes Quadrat ☂", "seed": 3}


@pytest.fixture
def picture():
    return Image.linear_gradient("L").resize((32, 16)).convert("RGB")


@pytest.mark.parametrize(("name", "kind"), [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")])
def test_the_file_is_what_it_says_and_repeats(picture, name, kind):
    data = encode_image(picture, name, None, PARAMETERS)
    assert data == encode_image(picture, name, None, dict(reversed(PARAMETERS.items())))
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.size) == (kind, (32, 16))


def test_png_keeps_pixels_and_parameters(picture):
    with Image.open(io.BytesIO(encode_image(picture, "png", None, PARAMETERS))) as image:
        assert image.tobytes() == picture.tobytes()
        assert json.loads(image.text["parameters"]) == PARAMETERS


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_quality_is_honoured(picture, name):
    small, large = (len(encode_image(picture, name, q, PARAMETERS)) for q in (10, 95))
    assert small < large
