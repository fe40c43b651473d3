"""The gated product of one row on a GPU, as a Triton kernel: a channel that is not kept is not read.

The weight is transposed, ``[C, O]``, as on the CPU (`hat_lib.engine.kernels`). A program has a tile of channels and
outputs, loads the rows that the thresholds keep, and adds its float32 sums to those of the others (split-K), as TEAL's
kernel (Liu et al. 2024, arXiv:2408.14690) does in float16. No forward uses it yet, and its speed was never measured:
``python -m studies.gpu.triton_product`` times it on a GPU. On a CPU it runs, slowly, under ``TRITON_INTERPRET=1``.
"""

import torch
import triton
import triton.language as tl
import triton.testing
from torch import Tensor

TILE = {"channels": 32, "outputs": 128}
SHAPES = ((2048, 2560), (2048, 2048), (2048, 11264), (5632, 2048))
"""the products of a layer of TinyLlama-1.1B, channels and outputs: q|k|v, o, gate|up, down"""


@triton.jit
def _kernel(x, w, threshold, scale, y, C, O, channels: tl.constexpr, outputs: tl.constexpr):  # noqa: E741
    row = tl.program_id(0) * channels + tl.arange(0, channels)
    column = tl.program_id(1) * outputs + tl.arange(0, outputs)
    value = tl.load(x + row, mask=row < C, other=0.0).to(tl.float32)
    kept = (tl.abs(value) > tl.load(threshold + row, mask=row < C, other=0.0) * scale) & (row < C)
    seen = kept[:, None] & (column < O)[None, :]
    weight = tl.load(w + row[:, None] * O + column[None, :], mask=seen, other=0.0).to(tl.float32)
    tl.atomic_add(y + column, tl.sum(tl.where(kept, value, 0.0)[:, None] * weight, axis=0), mask=column < O)


def gated_product(x: Tensor, w: Tensor, threshold: Tensor, scale: float = 1.0) -> Tensor:
    """``y = sum of x_i w[i]`` over the channels with ``|x_i| > threshold_i * scale``: float32 ``[O]``.

    Args:
        x: ``[C]``, float32, bfloat16 or float16.
        w: ``[C, O]``, transposed and contiguous, of any of these dtypes.
        threshold: float32 ``[C]``; a negative one always keeps its channel.
        scale: the token's own (`hat_lib.method.routers.MoERouter.threshold_scale`).

    Programs add their sums in any order, so the last bits differ from run to run.
    """
    channels, outputs = w.shape
    if x.shape != (channels,) or threshold.shape != (channels,) or not w.is_contiguous():
        raise ValueError("x and threshold must have the rows of a contiguous w [C, O]")
    y = torch.zeros(outputs, dtype=torch.float32, device=x.device)
    grid = (triton.cdiv(channels, TILE["channels"]), triton.cdiv(outputs, TILE["outputs"]))
    _kernel[grid](x, w, threshold, scale, y, channels, outputs, **TILE)
    return y


def main() -> None:
    """Print median microseconds of each product, dense in torch and gated at several shares."""
    if not torch.cuda.is_available():
        raise SystemExit("this benchmark needs a CUDA device, and torch sees none")
    print(f"{torch.cuda.get_device_name()}, bfloat16, one row, us")
    for channels, outputs in SHAPES:
        draw = torch.Generator("cuda").manual_seed(0)
        w = torch.randn(channels, outputs, device="cuda", generator=draw).bfloat16()
        x = torch.randn(channels, device="cuda", generator=draw).bfloat16()
        rows = w.t().contiguous()
        columns = [f"dense {_microseconds(lambda x=x, rows=rows: torch.nn.functional.linear(x[None], rows)):7.1f}"]
        for share in (1.0, 0.75, 0.6, 0.5, 0.4):
            threshold = x.float().abs().quantile(1 - share) if share < 1 else torch.tensor(-1.0, device="cuda")
            each = threshold.expand(channels).contiguous()
            columns.append(f"{share:.2f} {_microseconds(lambda x=x, w=w, t=each: gated_product(x, w, t)):7.1f}")
        print(f"{channels:5d} x {outputs:5d}  " + "  ".join(columns))


def _microseconds(once) -> float:
    return 1e3 * triton.testing.do_bench(once, return_mode="median")


if __name__ == "__main__":
    main()
