"""C2PA: signed with a certificate made here, read back with c2pa's own reader."""

import io
import json
import re
import zlib
from concurrent.futures import ThreadPoolExecutor

import c2pa
import pytest
from PIL import Image

from server.inspection import picture_facts
from server.protocol import MEDIA_TYPES
from server.worker.content_credentials import GENERATED, open_credentials
from server.worker.picture_file import encode_image, read_parameters
from tests.certificates import KEYS, make_signing

PARAMETERS = {"prompt": "ein rotes Quadrat ☂", "seed": 3, "model": "demo"}
HASH = "ab" * 32


def drawn(name="png", parameters=PARAMETERS):
    picture = Image.linear_gradient("L").resize((32, 16)).convert("RGB")
    return encode_image(picture, name, None, parameters)


def manifest_of(data, name):
    with c2pa.Reader(MEDIA_TYPES[name], io.BytesIO(data)) as reader:
        return reader.get_active_manifest(), reader.get_validation_state()


@pytest.fixture
def signing(tmp_path):
    return make_signing(tmp_path)


@pytest.mark.parametrize("name", list(MEDIA_TYPES))
def test_a_signed_picture_says_what_made_it_and_still_shows_the_same(signing, name):
    plain = drawn(name)
    signed = open_credentials(signing.cert, signing.key).sign(plain, name, "demo", HASH)
    manifest, state = manifest_of(signed, name)
    assert state == "Valid"
    assert manifest["signature_info"]["common_name"] == "Picture Desk"
    (actions,) = [a for a in manifest["assertions"] if a["label"] == "c2pa.actions.v2"]
    (created,) = actions["data"]["actions"]
    assert created["action"] == "c2pa.created"
    assert created["digitalSourceType"] == GENERATED
    assert created["softwareAgent"] == {"name": "demo", "version": HASH}
    assert manifest["claim_generator_info"][0]["name"] == "lumina-serve"
    assert "rotes" not in json.dumps(manifest)  # the prompt is in the parameters only
    with Image.open(io.BytesIO(plain)) as before, Image.open(io.BytesIO(signed)) as after:
        assert before.tobytes() == after.tobytes()
        assert json.loads(read_parameters(after)) == PARAMETERS


@pytest.mark.parametrize("kind", KEYS)
def test_the_algorithm_follows_the_key(tmp_path, kind):
    files = make_signing(tmp_path, kind)
    credentials = open_credentials(files.cert, files.key)
    manifest, state = manifest_of(credentials.sign(drawn(), "png", "demo", HASH), "png")
    assert (state, manifest["signature_info"]["alg"].lower()) == ("Valid", kind)


def test_a_changed_picture_is_noticed(signing, tmp_path):
    signed = open_credentials(signing.cert, signing.key).sign(drawn(), "png", "demo", HASH)
    forged = signed.replace(b"rotes Quadrat", b"blaue Kreise.")
    assert forged != signed
    # The chunk's own check sum, so that it is C2PA and not the PNG reader that notices.
    at = forged.index(b"iTXtparameters") - 4
    length = int.from_bytes(forged[at : at + 4], "big")
    crc = zlib.crc32(forged[at + 4 : at + 8 + length]).to_bytes(4, "big")
    forged = forged[: at + 8 + length] + crc + forged[at + 12 + length :]
    for name, data in (("signed.png", signed), ("forged.png", forged)):
        (tmp_path / name).write_bytes(data)
    assert dict(picture_facts(tmp_path / "signed.png"))["C2PA"].startswith("signature and content")
    facts = dict(picture_facts(tmp_path / "forged.png"))
    assert facts["C2PA"] == "NOT VALID: assertion.dataHash.mismatch"


def test_two_threads_sign_at_once(signing):
    credentials = open_credentials(signing.cert, signing.key)
    with ThreadPoolExecutor(2) as threads:
        signed = list(
            threads.map(lambda _: credentials.sign(drawn(), "png", "demo", HASH), range(8))
        )
    assert {manifest_of(data, "png")[1] for data in signed} == {"Valid"}
    assert len(set(signed)) == 8  # no two manifests are alike, as documented


def test_inspect_shows_parameters_and_credentials(signing, tmp_path):
    signed = open_credentials(signing.cert, signing.key).sign(drawn(), "png", "demo", HASH)
    (tmp_path / "a.png").write_bytes(signed)
    facts = dict(picture_facts(tmp_path / "a.png"))
    assert facts["prompt"] == PARAMETERS["prompt"]
    assert facts["signed by"] == "Picture Desk of The Tests' Gazette, Es256"
    assert re.fullmatch(r"lumina-serve \d.*", facts["claimed by"])
    assert facts["claims"] == f"c2pa.created as trainedAlgorithmicMedia by demo {HASH}"
    bare = open_credentials(signing.cert, signing.key).sign(
        drawn(parameters=None), "png", "demo", HASH
    )
    (tmp_path / "b.png").write_bytes(bare)
    assert dict(picture_facts(tmp_path / "b.png"))["parameters"] == "none"


def test_nothing_configured_signs_nothing():
    assert open_credentials(None, None) is None


def test_files_that_cannot_sign_are_one_sentence(signing, tmp_path):
    junk, gone = tmp_path / "junk.pem", tmp_path / "gone.pem"
    junk.write_text("-----BEGIN NOTHING-----")
    (tmp_path / "old").mkdir()
    expired = make_signing(tmp_path / "old", valid_days=-1)
    root_only = tmp_path / "root.pem"
    root_only.write_bytes(
        signing.cert.read_bytes().split(b"-----END CERTIFICATE-----\n")[1]
        + b"-----END CERTIFICATE-----\n"
    )
    cases = [
        (signing.cert, None, "LUMINA_C2PA_CERT and LUMINA_C2PA_KEY belong together"),
        (None, signing.key, "belong together"),
        (gone, signing.key, f"LUMINA_C2PA_CERT {gone}: No such file"),
        (signing.cert, tmp_path, f"LUMINA_C2PA_KEY {tmp_path}: Is a directory"),
        (junk, signing.key, f"LUMINA_C2PA_CERT {junk}: not a PEM chain"),
        (signing.cert, junk, f"LUMINA_C2PA_KEY {junk}: not a PEM private key"),
        (signing.cert, signing.other_key, "the picture cannot be signed"),
        (expired.cert, expired.key, "the picture cannot be signed"),
        (root_only, signing.key, "the picture cannot be signed"),
    ]
    for cert, key, words in cases:
        with pytest.raises(ValueError, match=re.escape(words)) as raised:
            open_credentials(cert, key)
        assert "\n" not in str(raised.value).strip()
