"""Keys of the kind that `openssl genpkey` makes."""

from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def make_key(
    path: Path, passphrase: str | None = None, curve: ec.EllipticCurve | None = None, mode: int = 0o600
) -> Path:
    """Write a private key, and the public one beside it as `.pub`; return the private one's path."""
    key = ec.generate_private_key(curve or ec.SECP256R1())
    encryption = (
        serialization.BestAvailableEncryption(passphrase.encode())
        if passphrase
        else serialization.NoEncryption()
    )
    path.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    )
    path.chmod(mode)
    path.with_suffix(".pub").write_bytes(
        key.public_key().public_bytes(
            serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
        )
    )
    return path
