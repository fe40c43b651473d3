"""How the engine's functions are compiled, and where compiled code is kept.

Compiling the loop takes half a minute. It is kept in the user's cache, for the sources of the whole engine:
numba itself looks only at the function's own file, and would run old code after its helpers have changed.
"""

import contextlib
import hashlib
import warnings
from pathlib import Path

from numba import njit
from numba.core import caching

from hat_lib.config import cache_dir

REORDER = {"reassoc", "nsz", "arcp", "afn", "contract"}
"""LLVM's freedoms with sums and products; not that NaN and infinity do not exist"""


def compiled(*, reorder: bool = False, numbers: bool = False, keep: bool = False, inline: bool = False):
    """Compile a function with numba when it is first called; it runs without the GIL.

    Args:
        reorder: whether sums may be reordered; else products and sums are fused (FMA), and nothing more.
        numbers: whether what it returns for NaN does not matter: a maximum is then found many numbers at a time.
        inline: whether to compile it only as a part of what calls it, which spares a large function a second time.
        keep: whether to keep the compiled code for other processes. Warns of a folder that cannot be written.
    """

    def wrap(function):
        fastmath = (REORDER if reorder else {"contract"}) | ({"nnan", "nsz"} if numbers else set())
        how = {"boundscheck": False, "error_model": "numpy", "nogil": True, "inline": "always" if inline else "never"}
        dispatcher = njit(fastmath=fastmath, **how)(function)
        if keep:
            try:
                dispatcher._cache = _Cache(function)
            except Exception as error:  # no folder, or another numba
                how = "set HAT_CACHE to an absolute path of a folder that can be"
                text = f"compiled code cannot be written ({error}), so each process compiles for up to a minute: {how}"
                warnings.warn(text, stacklevel=2)
        return dispatcher

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


class _CacheImpl(caching.CompileResultCacheImpl):
    _locator_classes = [_Locator]


class _Cache(caching.FunctionCache):
    """Drops what it cannot read (damaged, or of other classes), and goes on when nothing more can be kept."""

    _impl_class = _CacheImpl

    def load_overload(self, signature, context):
        try:
            return super().load_overload(signature, context)
        except Exception:
            with contextlib.suppress(OSError):
                self.flush()

    def save_overload(self, signature, data):
        with contextlib.suppress(Exception):
            super().save_overload(signature, data)
