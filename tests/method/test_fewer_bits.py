"""Eight and four bits, against plain torch that rounds weights and inputs as the engine does."""

import pytest
import torch
import torch.nn.functional as F
from four_bits_read import packed_and_read
from tiny_runs import peaked, skipping, stepwise

from hat_lib.base.families import LINEARS
from hat_lib.engine.weights import pack

pytestmark = pytest.mark.usefixtures("no_grad")


def rounded(x, block, most):
    """Inputs that share a scale in blocks; those that are not kept are 0, and count for nothing."""
    blocks = x.unflatten(-1, (-1, block))
    unit = blocks.abs().amax(-1, keepdim=True) / most
    return ((blocks / unit.clamp(min=1e-30)).round() * unit).flatten(-2)


def weights(lm, form):
    """Each linear layer, and its weights as packed."""
    matrices = {(name, i): read for name, i, _, read in packed_and_read(lm)}
    for (name, i), read in matrices.items():
        modules = [lm.model.layers[i].get_submodule(linear) for linear in LINEARS[name]]
        if form == "int8":
            own = torch.cat([m.weight for m in modules])
            scale = own.abs().amax(1, keepdim=True) / 127
            read = (own / scale).round() * scale
        yield from zip(modules, read.split([m.out_features for m in modules]), strict=True)


def in_fewer_bits(lm, form):
    """Hooks, before those of the corrections, with which the reference path computes in a format of the engine."""

    def replace(module, weight, block, most):
        def compute(_, args, out):
            return F.linear(rounded(args[0], block or args[0].shape[-1], most), weight, module.bias)

        module.register_forward_hook(compute, prepend=True)

    for module, weight in [*weights(lm, form)]:
        replace(module, weight, 16, 127)
    packed = pack(lm, form)
    groups = torch.from_numpy(packed.head).float().unflatten(1, (-1, 32))
    scales = torch.from_numpy(packed.head_scale).view(torch.half).float()
    replace(lm.lm_head, (groups * scales[..., None]).flatten(1), 0, 32767)


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("form", ["int8", "q4"])
def test_skipping_exits_and_corrections_are_those_of_plain_torch(form, rank, ids):
    hat = skipping("channel", peaked(), correction_rank=rank)
    for parameter in hat.corrections.parameters():
        parameter.copy_(parameter.bfloat16())  # as they are packed beside fewer bits
    with hat.changed(weight_format=form):
        fast, trace = stepwise(hat, ids), hat.trace
    in_fewer_bits(hat.lm, form)
    slow = stepwise(hat, ids)
    assert trace.executed is not None and hat.trace.executed is None and trace.capacity < 0.9
    # Where a number is rounded the other way, a code is one more or less: that shows at a few tokens.
    assert float((fast - slow).abs().amax(-1).median() / slow.std()) < 1e-5
