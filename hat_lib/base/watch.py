"""Whether weights were changed under a model: what it derived from them (norms, packed copies) is then rebuilt."""

import torch
from torch import Tensor, nn

FEW = 16  # numbers of a tensor that are checked


class Watch:
    """Watches the tensors of some modules: their addresses, torch's count of changes in place and, on a CPU, a few
    numbers: torch does not count changes through ``.data``, by which adapters are merged. About a microsecond each."""

    def __init__(self, *roots: nn.Module):
        modules = [module for root in roots for module in root.modules()]
        self._tensors = [tensors for m in modules for tensors in (m._parameters, m._buffers) if tensors]
        self._places = None
        self.seen = self.look()
        """what everything was like when what was derived from it was last made"""

    def look(self) -> tuple:
        """What everything is like now, to be compared with ``seen``."""
        tensors = [t for named in self._tensors for t in named.values() if t is not None]
        places = [(t.data_ptr(), t.dtype, t.device) for t in tensors]
        if places != self._places:
            self._places, self._numbers = places, [_few(t) for t in tensors if t.device.type == "cpu"]
        counts = [0 if t.is_inference() else t._version for t in tensors]
        return places, counts, [numbers.tobytes() for numbers in self._numbers]


def _few(tensor: Tensor):
    """About `FEW` numbers of a tensor, a numpy array that shares its memory."""
    tensor, each = tensor.detach(), FEW if tensor.dim() < 2 else int(FEW**0.5)
    some = tensor[tuple(slice(None, None, max(1, size // each)) for size in tensor.shape)]
    return (some.view(torch.uint16) if some.dtype == torch.bfloat16 else some).numpy()
