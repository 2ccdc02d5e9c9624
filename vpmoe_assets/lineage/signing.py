"""Signatures: an in-toto statement in a DSSE envelope, in the bundle that model-signing and cosign read.

The bundle is `application/vnd.dev.sigstore.bundle.v0.3+json` with a public key's hint (sha256 of its PEM) as
verification material; what is signed is the pre-authentication encoding of the statement
(https://github.com/secure-systems-lab/dsse/blob/v1.0.0/protocol.md) with ECDSA over P-256, P-384 or P-521 and
the SHA-2 of that size. Keys are local files; nothing is asked of a network.
"""

import base64
import hashlib
import json
import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.canonical import canonical_json
from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.errors import SignatureError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import (
        ECDSA,
        EllipticCurvePrivateKey,
        EllipticCurvePublicKey,
    )

PAYLOAD_TYPE = "application/vnd.in-toto+json"
BUNDLE_TYPE = "application/vnd.dev.sigstore.bundle.v0.3+json"
MAKE_KEY = "openssl genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -aes-256-cbc -out private.pem"
MAKE_PUBLIC = "openssl pkey -in private.pem -pubout -out public.pem"
_CURVES = ("secp256r1", "secp384r1", "secp521r1")


@dataclass(frozen=True)
class Signer:
    """A private key that was opened.

    Attributes:
        public_pem: The public key that belongs to it.
        key: sha256 of `public_pem`, by which signatures name it.
    """

    _private: "EllipticCurvePrivateKey"
    public_pem: bytes
    key: str

    @classmethod
    def of(cls, path: Path, passphrase: Callable[[], str | None]) -> "Signer":
        """Open a private key.

        Args:
            path: Of the PEM file; nobody else may read it.
            passphrase: Asked only where the key is encrypted; None where there is none to be had.

        Raises:
            SignatureError: The file is readable for others, is no such key, or the passphrase is wrong or
                missing; says which, and what to do.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        content = _private_bytes(path)
        try:
            try:
                key = load_pem_private_key(content, None)
            except TypeError:  # it is encrypted
                given = passphrase()
                if given is None:
                    raise SignatureError(
                        f"{path} is encrypted: set VPMOE_KEY_PASSPHRASE, or run this on a terminal, where it "
                        "is asked for"
                    ) from None
                key = load_pem_private_key(content, given.encode())
        except ValueError:
            raise SignatureError(
                f"{path}: no private key in PEM, or another passphrase than its own; make one with {MAKE_KEY}"
            ) from None
        except UnsupportedAlgorithm as error:
            raise SignatureError(f"{path}: {error}; make one with {MAKE_KEY}") from None
        if not isinstance(key, EllipticCurvePrivateKey):
            raise SignatureError(_other_key(path, type(key).__name__))
        _require_curve(path, key.curve.name)
        pem = _pem(key.public_key())
        return cls(key, pem, hashlib.sha256(pem).hexdigest())

    def sign(self, statement: Mapping[str, Any]) -> bytes:
        """Return the bundle of an in-toto statement, signed."""
        payload = canonical_json(statement).encode("ascii")
        signature = self._private.sign(_authenticated(payload), _algorithm(self._private.curve.key_size))
        return canonical_json(
            {
                "mediaType": BUNDLE_TYPE,
                "verificationMaterial": {"publicKey": {"hint": self.key}, "tlogEntries": []},
                "dsseEnvelope": {
                    "payload": base64.b64encode(payload).decode(),
                    "payloadType": PAYLOAD_TYPE,
                    "signatures": [{"sig": base64.b64encode(signature).decode(), "keyid": ""}],
                },
            }
        ).encode("ascii")


@dataclass(frozen=True)
class Verifier:
    """A public key.

    Attributes:
        key: sha256 of its PEM.
    """

    _public: "EllipticCurvePublicKey"
    key: str

    @classmethod
    def of(cls, pem: bytes, where: str | Path) -> "Verifier":
        """Read a public key.

        Args:
            pem: The key.
            where: Named in messages.

        Raises:
            SignatureError: It is no such key.
        """
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key

        try:
            key = load_pem_public_key(pem)
        except (ValueError, UnsupportedAlgorithm):
            raise SignatureError(f"{where}: no public key in PEM; make it with {MAKE_PUBLIC}") from None
        if not isinstance(key, EllipticCurvePublicKey):
            raise SignatureError(_other_key(where, type(key).__name__))
        _require_curve(where, key.curve.name)
        return cls(key, hashlib.sha256(_pem(key)).hexdigest())

    def opened(self, bundle: bytes) -> tuple[dict[str, Any], str]:
        """Return the statement in a bundle, and the sha256 of its bytes, if this key signed it.

        Raises:
            SignatureError: It did not, or that is no bundle.
        """
        from cryptography.exceptions import InvalidSignature

        try:
            fields = parse_json(bundle)
            envelope = fields["dsseEnvelope"]
            hint = fields["verificationMaterial"]["publicKey"]["hint"]
            payload = base64.b64decode(envelope["payload"], validate=True)
            signature = base64.b64decode(envelope["signatures"][0]["sig"], validate=True)
            whole = (fields["mediaType"], envelope["payloadType"]) == (BUNDLE_TYPE, PAYLOAD_TYPE)
        except (ValueError, KeyError, TypeError, IndexError):
            whole = False
        if not whole:
            raise SignatureError("is no bundle with an in-toto statement")
        if hint != self.key:
            raise SignatureError(f"was signed with key {str(hint)[:12]}, not with {self.key[:12]}")
        try:
            self._public.verify(signature, _authenticated(payload), _algorithm(self._public.curve.key_size))
        except InvalidSignature:
            raise SignatureError(f"does not verify with key {self.key[:12]}") from None
        statement: dict[str, Any] = json.loads(payload)
        return statement, hashlib.sha256(payload).hexdigest()


def _private_bytes(path: Path) -> bytes:
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe without writer, too
    with os.fdopen(descriptor, "rb") as file:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise SignatureError(f"{path} is no file; make a key with {MAKE_KEY}")
        if stat.S_IMODE(mode) & 0o077:
            raise SignatureError(
                f"{path} can be read by others (mode {stat.S_IMODE(mode):04o}): chmod 600 {path}, and "
                "make another key where somebody may have read it"
            )
        return file.read()


def _require_curve(where: str | Path, curve: str) -> None:
    if curve not in _CURVES:
        raise SignatureError(_other_key(where, f"EC over {curve}"))


def _other_key(where: str | Path, found: str) -> str:
    return f"{where}: {found}, expected an EC key over P-256, P-384 or P-521; make one with {MAKE_KEY}"


def _pem(key: "EllipticCurvePublicKey") -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat

    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)


def _algorithm(bits: int) -> "ECDSA":
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric.ec import ECDSA

    named: dict[int, hashes.HashAlgorithm] = {
        256: hashes.SHA256(),
        384: hashes.SHA384(),
        521: hashes.SHA512(),
    }
    return ECDSA(named[bits])


def _authenticated(payload: bytes) -> bytes:
    """Return what a DSSE signature is over: the pre-authentication encoding."""
    kind = PAYLOAD_TYPE.encode("ascii")
    return b"DSSEv1 %d %s %d %s" % (len(kind), kind, len(payload), payload)
