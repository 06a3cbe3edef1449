"""Certificates made on the spot: chains as an operator would get them for C2PA, and for servers."""

import datetime
from dataclasses import dataclass
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

KEYS = {
    "es256": lambda: ec.generate_private_key(ec.SECP256R1()),
    "es384": lambda: ec.generate_private_key(ec.SECP384R1()),
    "ps256": lambda: rsa.generate_private_key(65537, 2048),
    "ed25519": ed25519.Ed25519PrivateKey.generate,
}


@dataclass(frozen=True)
class Signing:
    """Files of a signing certificate (its chain), its key, and another key of the same kind."""

    cert: Path
    key: Path
    other_key: Path


def make_signing(folder: Path, kind: str = "es256", *, valid_days: int = 30) -> Signing:
    """A root that vouches for a signer of the Tests' Gazette; `valid_days` < 0 has expired."""
    root_key, key, other = KEYS["es256"](), KEYS[kind](), KEYS[kind]()
    root_name, name = _name("Test Root"), _name("Picture Desk")
    root = _certificate(root_name, root_name, root_key.public_key(), ca=True, valid_days=3650)
    leaf = _certificate(name, root_name, key.public_key(), ca=False, valid_days=valid_days)
    leaf = leaf.add_extension(
        x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION]), critical=False
    ).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False
    )
    chain = [each.sign(root_key, SHA256()).public_bytes(Encoding.PEM) for each in (leaf, root)]
    files = Signing(folder / "chain.pem", folder / "key.pem", folder / "other.pem")
    files.cert.write_bytes(b"".join(chain))
    for path, secret in ((files.key, key), (files.other_key, other)):
        path.write_bytes(secret.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    return files


def self_signed(name: str, folder: Path) -> Path:
    """A self-signed certificate for `name` with its key, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    signed = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(hours=1))
        .not_valid_after(now + datetime.timedelta(hours=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
        .sign(key, SHA256())
    )
    pem = key.private_bytes(
        Encoding.PEM,
        PrivateFormat.PKCS8,
        NoEncryption(),
    )
    file = folder / f"{name}.pem"
    file.write_bytes(pem + signed.public_bytes(Encoding.PEM))
    return file


def _name(common: str) -> x509.Name:
    organisation = x509.NameAttribute(NameOID.ORGANIZATION_NAME, "The Tests' Gazette")
    return x509.Name([organisation, x509.NameAttribute(NameOID.COMMON_NAME, common)])


def _certificate(subject, issuer, public_key, *, ca, valid_days):
    usage = dict.fromkeys(
        ("content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=60))
        .not_valid_after(now + datetime.timedelta(days=valid_days))
        .add_extension(x509.BasicConstraints(ca, None), critical=True)
        .add_extension(
            x509.KeyUsage(digital_signature=not ca, key_cert_sign=ca, crl_sign=ca, **usage),
            critical=True,
        )
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )
