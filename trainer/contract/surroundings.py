"""What of the environment decides whether an HTTP client can be made and can connect."""

import os

from trainer.contract.credentials import without_credentials

_HEEDED = ("ALL_PROXY", "HTTPS_PROXY", "HTTP_PROXY", "SSL_CERT_FILE", "SSL_CERT_DIR")


def surroundings() -> str:
    """Return the variables for proxies and certificates that are set, for messages, without credentials."""
    names = [name for heeded in _HEEDED for name in (heeded, heeded.lower()) if os.environ.get(name)]
    return ", ".join(f"{name}={without_credentials(os.environ[name])}" for name in names)
