"""C2PA content credentials: pictures signed with the operator's certificate, and their reading.

A signed picture says that a model made it, which one, and who vouches for that; the signature
covers every byte, the parameters among them. Claims, boxes and signatures are c2pa-python's (an
extra). Signatures and manifest ids are random, so equal requests no longer give equal bytes, only
equal pixels and parameters. The signature has no trusted time stamp: nothing here calls out.
"""

import io
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from PIL import Image

from server.protocol import MEDIA_TYPES, OutputFormat

GENERATED = "http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"
MISSING = "C2PA needs the extra `c2pa`: pip install '.[c2pa]'"

_CURVES = {"secp256r1": b"es256", "secp384r1": b"es384", "secp521r1": b"es512"}


@dataclass(frozen=True)
class ContentCredentials:
    """Signs pictures; made by `open_credentials`. Safe to use from several threads.

    Attributes:
        chain: PEM of the signing certificate and those that vouch for it.
        key: PEM of its private key.
        algorithm: of the signature, in C2PA's words.
    """

    chain: bytes
    key: bytes
    algorithm: bytes

    def sign(
        self, data: bytes, output_format: OutputFormat, model_name: str, model_hash: str
    ) -> bytes:
        """Return the picture with a signed manifest; raises ValueError if it cannot be signed."""
        import c2pa

        signed = io.BytesIO()
        info = c2pa.C2paSignerInfo(
            alg=self.algorithm, sign_cert=self.chain, private_key=self.key, ta_url=None
        )
        try:
            # A signer belongs to one signature: they are not for use by several threads.
            with (
                c2pa.Context.from_dict(_SETTINGS) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(_manifest(model_name, model_hash), context=context) as builder,
            ):
                builder.sign(signer, MEDIA_TYPES[output_format], io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            raise ValueError(f"the picture cannot be signed: {error}") from None
        return signed.getvalue()


# A thumbnail would be a second picture in each file. What was signed is verified before it leaves.
_SETTINGS = {
    "version": 1,
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"verify_after_sign": True},
}


def _manifest(model_name: str, model_hash: str) -> dict[str, Any]:
    created = {
        "action": "c2pa.created",
        "digitalSourceType": GENERATED,
        "softwareAgent": {"name": model_name, "version": model_hash},
    }
    return {
        "claim_generator_info": [
            {"name": "lumina-serve", "version": metadata.version("lumina-serve")}
        ],
        "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [created]}}],
    }


def open_credentials(cert: Path | None, key: Path | None) -> ContentCredentials | None:
    """Read and try a certificate chain and its key; None where none is configured.

    Raises ValueError with one sentence for files that cannot sign pictures, or without the extra.
    """
    if cert is None and key is None:
        return None
    if cert is None or key is None:
        raise ValueError("LUMINA_C2PA_CERT and LUMINA_C2PA_KEY belong together: give both or none")
    try:
        import c2pa  # noqa: F401
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
        from cryptography.x509 import load_pem_x509_certificates
    except ImportError:
        raise ValueError(MISSING) from None
    chain, secret = _read("LUMINA_C2PA_CERT", cert), _read("LUMINA_C2PA_KEY", key)
    try:
        load_pem_x509_certificates(chain)
    except ValueError:
        raise ValueError(f"LUMINA_C2PA_CERT {cert}: not a PEM chain of certificates") from None
    try:
        private = load_pem_private_key(secret, password=None)
    except (ValueError, TypeError):
        raise ValueError(f"LUMINA_C2PA_KEY {key}: not a PEM private key without password") from None
    algorithm = _algorithm(private)
    if algorithm is None:
        kinds = "an EC (P-256, P-384, P-521), RSA or Ed25519 key"
        raise ValueError(f"LUMINA_C2PA_KEY {key}: must be {kinds}")
    credentials = ContentCredentials(chain, secret, algorithm)
    _try(credentials, cert)
    return credentials


def _read(variable: str, path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise ValueError(f"{variable} {path}: {error.strerror or error}") from None


def _algorithm(private: Any) -> bytes | None:
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    if isinstance(private, ec.EllipticCurvePrivateKey):
        return _CURVES.get(private.curve.name)
    if isinstance(private, rsa.RSAPrivateKey):
        return b"ps256"
    return b"ed25519" if isinstance(private, ed25519.Ed25519PrivateKey) else None


def _try(credentials: ContentCredentials, cert: Path) -> None:
    """Sign a small picture: the library checks the certificate only when it is used."""
    picture = io.BytesIO()
    Image.new("RGB", (16, 16)).save(picture, "PNG")
    try:
        credentials.sign(picture.getvalue(), "png", "none", "none")
    except ValueError as error:
        raise ValueError(f"LUMINA_C2PA_CERT {cert}: {error}") from None


def credential_facts(path: Path) -> list[tuple[str, str]]:
    """What the C2PA manifest of a picture file says, and whether it holds, as lines; [] for none.

    Without the extra, [] too. Whether the signer is to be trusted is for the reader to decide: no
    list of trusted certificates is consulted.
    """
    try:
        import c2pa
    except ImportError:
        return []
    try:
        with path.open("rb") as file, c2pa.Reader(file) as reader:
            manifest, state = reader.get_active_manifest(), reader.get_validation_state()
            results = reader.get_validation_results() or {}
    except c2pa.C2paError as error:
        if "ManifestNotFound" in str(error):
            return []
        return [("C2PA", f"cannot be read: {' '.join(str(error).split())}")]
    failed = [each["code"] for each in results.get("activeManifest", {}).get("failure", [])]
    return [("C2PA", _verdict(state, failed)), *_claims(manifest)]


def _verdict(state: str | None, failures: list[str]) -> str:
    if state in ("Valid", "Trusted"):
        trust = "" if state == "Trusted" else " (the signer is not checked against a trust list)"
        return f"signature and content agree{trust}"
    broken = [code for code in failures if code != "signingCredential.untrusted"]
    return f"NOT VALID: {', '.join(broken) or state}"


def _claims(manifest: dict[str, Any] | None) -> list[tuple[str, str]]:
    manifest = manifest or {}
    signer = manifest.get("signature_info", {})
    who = " of ".join(signer[name] for name in ("common_name", "issuer") if signer.get(name))
    facts = [("signed by", f"{who}, {signer.get('alg', 'unknown algorithm')}")]
    for generator in manifest.get("claim_generator_info", [])[:1]:
        facts.append(("claimed by", _named(generator)))
    for assertion in manifest.get("assertions", []):
        if assertion.get("label", "").startswith("c2pa.actions"):
            facts += [("claims", _action(action)) for action in assertion["data"]["actions"]]
    return facts


def _action(action: dict[str, Any]) -> str:
    words = [action.get("action", "unknown action")]
    if "digitalSourceType" in action:
        words.append(f"as {action['digitalSourceType'].rsplit('/', 1)[-1]}")
    if isinstance(action.get("softwareAgent"), dict):
        words.append(f"by {_named(action['softwareAgent'])}")
    return " ".join(words)


def _named(software: dict[str, Any]) -> str:
    return " ".join(str(software[name]) for name in ("name", "version") if software.get(name))
