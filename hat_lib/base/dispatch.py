"""Bases that accelerate spreads over devices, or keeps in memory or on disk between forwards.

Its hooks wrap the forward of each module: they move inputs to where the module computes and fetch its weights. So a
forward of ours goes inside them, where the module's own was.
"""

from collections.abc import Callable, Iterator

import torch
from accelerate.utils.modeling import align_module_device
from torch import Tensor, nn


def is_dispatched(module: nn.Module) -> bool:
    return any(hasattr(m, "_hf_hook") for m in module.modules())


def device_of(module: nn.Module) -> torch.device:
    """Where a module computes; where its parameters are, without accelerate."""
    where = getattr(getattr(module, "_hf_hook", None), "execution_device", None)
    return next(module.parameters()).device if where is None else torch.device(where)


def overridden(module: nn.Module) -> Callable | None:
    """The forward that replaces a module's own, accelerate's aside."""
    forward = vars(module).get(_place(module))
    return None if getattr(forward, "__func__", None) is type(module).forward else forward


def override(module: nn.Module, forward: Callable) -> None:
    setattr(module, _place(module), forward)


def restore(module: nn.Module) -> None:
    """Give a module its own forward again."""
    if _place(module) == "forward":
        vars(module).pop("forward", None)
    else:
        override(module, type(module).forward.__get__(module))


def tensors(module: nn.Module) -> list[Tensor]:
    """Parameters, their gradients, and buffers."""
    parameters = list(module.parameters())
    return [*parameters, *(p.grad for p in parameters if p.grad is not None), *module.buffers()]


def named_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters by name, sorted, each once; what is kept elsewhere is fetched while it is looked at."""
    tied = module._tied_weights_keys if module.config.tie_word_embeddings else ()
    for name in sorted(n for n, p in module.named_parameters() if not (p.is_meta and n in tied)):
        owner = module.get_submodule(name.rpartition(".")[0])
        with align_module_device(owner):
            yield name, owner.get_parameter(name.rpartition(".")[2]).detach()


def _place(module: nn.Module) -> str:
    """The attribute that a module's forward is called by."""
    return "_old_forward" if hasattr(module, "_hf_hook") else "forward"
