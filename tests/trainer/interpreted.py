"""Triton's interpreter, for kernels with loops whose bounds are only known when they run."""

import pytest


@pytest.fixture(autouse=True)
def runtime_bounds(monkeypatch):
    """Let such a bound be counted to: Triton 3.6 asks NumPy for the int of an array, which 2.5 refuses."""
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", patched)
