import io
import json

import pytest
from PIL import Image

from model.generation_config import load_generation_config
from model.request import GenerationRequest
from server.worker.picture_file import carries, encode_image, parameters_of, read_parameters

PARAMETERS = {"prompt": "ein rotes Quadrat ☂ \U0001f308", "seed": 3}
FORMATS = [("png", "PNG"), ("jpeg", "JPEG"), ("webp", "WEBP")]


@pytest.fixture
def picture():
    return Image.linear_gradient("L").resize((32, 16)).convert("RGB")


def opened(data):
    return Image.open(io.BytesIO(data))


@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_the_file_is_what_it_says_and_repeats(picture, name, kind):
    data = encode_image(picture, name, None, PARAMETERS)
    assert data == encode_image(picture, name, None, dict(reversed(PARAMETERS.items())))
    with opened(data) as image:
        assert (image.format, image.size) == (kind, (32, 16))


@pytest.mark.parametrize(("name", "kind"), FORMATS)
def test_every_format_carries_the_parameters_unless_told_otherwise(picture, name, kind):
    assert carries(name, PARAMETERS)
    with opened(encode_image(picture, name, None, PARAMETERS)) as image:
        assert json.loads(read_parameters(image)) == PARAMETERS
    silent = encode_image(picture, name, None, None)
    with opened(silent) as image:
        assert image.format == kind
        assert read_parameters(image) is None
    assert b"rotes" not in silent
    assert "rotes".encode("utf-16-be") not in silent


def test_png_keeps_pixels_and_parameters(picture):
    with opened(encode_image(picture, "png", None, PARAMETERS)) as image:
        assert image.tobytes() == picture.tobytes()
        assert json.loads(image.text["parameters"]) == PARAMETERS


@pytest.mark.parametrize("name", ["jpeg", "webp"])
def test_quality_is_honoured(picture, name):
    small, large = (len(encode_image(picture, name, q, PARAMETERS)) for q in (10, 95))
    assert small < large


def test_what_is_too_long_for_a_format_is_left_out_whole(picture):
    # The longest a request can be: three texts of 4096 characters and a schedule of 1000 sigmas.
    long = {
        "prompt": "\U0001f308" * 4096,
        "negative_prompt": "☂" * 4096,
        "system_prompt": "x" * 4096,
    }
    long["sigmas"] = [1 - index / 1001 for index in range(1000)]
    assert [carries(name, long) for name, _ in FORMATS] == [True, False, False]
    for name, _ in FORMATS:
        with opened(encode_image(picture, name, None, long)) as image:
            text = read_parameters(image)
        assert (text is None) is (name != "png")
        if text is not None:
            assert json.loads(text) == long


def test_the_parameters_make_the_picture_again(tmp_path):
    (tmp_path / "generation_config.json").write_text('{"presets": {"own": {"shift": 3.0}}}')
    config = load_generation_config(tmp_path, shift=6.0, trained_size=64)
    request = config.resolve(
        GenerationRequest("a ☂", seed=7, num_images=3, preset="own", panel={"content": "edge map"})
    )
    parameters = parameters_of(request, "demo", "f" * 64, index=2)
    assert parameters["seed"] == 9
    assert (parameters["model"], parameters["model_hash"]) == ("demo", "f" * 64)
    assert not {"id", "num_images", "created", "metadata"} & set(parameters)
    read = json.loads(json.dumps(parameters))
    fields = {name: value for name, value in read.items() if not name.startswith("model")}
    if "panel" in fields:  # a panel names its template by itself
        del fields["system_prompt"]
    again = config.resolve(GenerationRequest(**fields))
    assert parameters_of(again, "demo", "f" * 64, index=0) == parameters
