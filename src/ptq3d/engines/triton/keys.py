"""Under which keys Triton keeps compiled kernels, made the same in every process.

Triton 3.6 takes the constants that a function uses into the key of a kernel that calls it only where that function has a key already:
keys depend on which kernel was launched first, and a later start that launches them in another order would compile all anew.
"""

from __future__ import annotations

from triton.runtime.jit import JITFunction

from ptq3d.engines.triton import arithmetic, convolution_kernels, normalization, pointwise, rows, sampling

MODULES = (arithmetic, rows, pointwise, normalization, sampling, convolution_kernels)


def fix_keys() -> None:
    """Give every kernel its key, in one order; to be called before the first is launched or compiled."""
    for module in MODULES:
        for value in vars(module).values():
            if isinstance(value, JITFunction):
                _ = value.cache_key
