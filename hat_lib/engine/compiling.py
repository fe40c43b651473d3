"""How the engine's functions are compiled, and where compiled code is kept.

Compiling the decode step takes some ten seconds. It is kept in the user's cache, for the sources of the whole engine:
numba itself looks only at the function's own file, and would run old code after its helpers have changed.
"""

from __future__ import annotations

import contextlib
import hashlib
from pathlib import Path

from numba import njit
from numba.core import caching

from hat_lib.config import cache_dir

OPTIONS = {"boundscheck": False, "error_model": "numpy", "nogil": True}


def compiled(*, reorder: bool = False, keep: bool = False):
    """Compile a function with numba when it is first called; it runs without the GIL.

    Args:
        reorder: whether sums may be reordered; else products and sums are fused (FMA), and nothing more.
        keep: whether to keep the compiled code for other processes. A folder that cannot be written is not an error.
    """

    def wrap(function):
        made = njit(**OPTIONS, fastmath=True if reorder else {"contract"})(function)
        if keep:
            try:
                made._cache = _Cache(function)
            except Exception:  # no folder, or another numba: compiled in each process
                return made
        return made

    return wrap


class _Locator(caching._CacheLocator):
    """Where a function's code is kept, and what it depends on besides types, numba and the CPU."""

    def get_cache_path(self) -> str:
        return str(cache_dir() / "compiled")

    def get_source_stamp(self) -> str:
        sources = sorted(Path(__file__).parent.glob("*.py"))
        return hashlib.sha256(b"".join(path.read_bytes() for path in sources)).hexdigest()

    def get_disambiguator(self) -> str:
        return "engine"

    @classmethod
    def from_function(cls, function, file):
        self = cls()
        self.ensure_cache_path()
        return self


class _Kept(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Cache(caching.FunctionCache):
    """Compiles whenever something is wrong with what was kept (damaged, half written) or with the folder (full)."""

    _impl_class = _Kept

    def load_overload(self, signature, context):
        try:
            return super().load_overload(signature, context)
        except Exception:
            return None

    def save_overload(self, signature, data):
        with contextlib.suppress(Exception):
            super().save_overload(signature, data)
