"""The linear layer of the network: in float32 on AMD's processors with AVX-512 its products come from oneDNN.

torch multiplies float32 matrices with Intel's MKL, which uses no more than AVX2 on processors of other makers. oneDNN,
which torch brings along and multiplies bfloat16 with, uses AVX-512 on all. Nothing else about the layer differs from
nn.Linear, and everywhere else it is nn.Linear. What this gains is in notebooks/measured_machine.md.

Dimension letters: M rows of x, K inputs, N outputs.
"""

import math
import platform
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.autograd.function import FunctionCtx
from torch.nn import functional as F
from torch.utils.flop_counter import register_flop_formula

WORTHWHILE = 1 << 22  # multiply-adds up to which the way to oneDNN takes longer than it saves
FEWEST_ROWS = 32  # below, reading the weights takes the time, whoever multiplies
NARROWEST = 128  # N or K of a weight's gradient below which copying an operand takes as long as the product


def onednn_is_faster() -> bool:
    """Whether MKL would multiply float32 matrices with half of the width that this processor's arithmetic has."""
    wide = torch.backends.cpu.get_cpu_capability().startswith("AVX512")
    both = torch.backends.mkl.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    if not wide or not both:
        return False
    about = Path("/proc/cpuinfo")
    return "AuthenticAMD" in (about.read_text() if about.is_file() else platform.processor())


BY_ONEDNN = onednn_is_faster()


def is_large(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN's preparation is worth its time for x [..., K] and weight [N, K]."""
    return x.numel() * weight.shape[0] > WORTHWHILE and x.numel() >= FEWEST_ROWS * weight.shape[1]


# Two operators, so that torch.compile takes a product as it is: whatever the shapes, and without looking inside.
_library = torch.library.Library("pixnerd", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_library.define("linear_weight_gradient(Tensor gradient, Tensor x) -> Tensor")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias. An x that is not contiguous is copied; weight or its transpose has to be contiguous."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@torch.library.impl(_library, "linear", "CPU")
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return (_onednn if is_large(x, weight) else F.linear)(x, weight, bias)


@torch.library.impl(_library, "linear_weight_gradient", "CPU")
def _(gradient: Tensor, x: Tensor) -> Tensor:
    gradient, x = (rows.reshape(math.prod(rows.shape[:-1]), rows.shape[-1]) for rows in (gradient, x))  # [M, N], [M, K]
    M, N, K = *gradient.shape, x.shape[1]
    if min(M, N, K) < NARROWEST:
        return gradient.t() @ x
    gradient, x = gradient.contiguous(), x.contiguous()  # strides such as those of `expand` would take oneDNN an age
    if M * N <= M * K + N * K:  # what is copied on either way
        return _onednn(gradient.t(), x.t())
    return _onednn(x.t(), gradient.t()).t().contiguous()


@torch.library.register_fake("pixnerd::linear", lib=_library)
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


@torch.library.register_fake("pixnerd::linear_weight_gradient", lib=_library)
def _(gradient: Tensor, x: Tensor) -> Tensor:
    return x.new_empty(gradient.shape[-1], x.shape[-1])


@register_flop_formula(torch.ops.pixnerd.linear)
def _(x: torch.Size, weight: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0]


@register_flop_formula(torch.ops.pixnerd.linear_weight_gradient)
def _(gradient: torch.Size, x: torch.Size, *_: object, **__: object) -> int:
    return 2 * math.prod(x) * gradient[-1]


class _Product(torch.autograd.Function):
    """x weightᵀ + bias with x [..., K], weight [N, K] and bias [N] → [..., N]."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.pixnerd.linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        (x, weight, _), (of_x, of_weight, _) = inputs, ctx.needs_input_grad
        ctx.save_for_backward(x if of_weight else None, weight if of_x else None)

    @staticmethod
    def backward(ctx: FunctionCtx, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        (x, weight), (of_x, of_weight, of_bias) = ctx.saved_tensors, ctx.needs_input_grad
        return (
            _Product.apply(gradient, weight.t(), None) if of_x else None,
            _WeightGradient.apply(gradient, x) if of_weight else None,
            gradient.sum_to_size(gradient.shape[-1]) if of_bias else None,
        )


class _WeightGradient(torch.autograd.Function):
    """The sum over all rows of gradientᵀ x, gradient [..., N] and x [..., K] → [N, K]."""

    @staticmethod
    def forward(gradient: Tensor, x: Tensor) -> Tensor:
        return torch.ops.pixnerd.linear_weight_gradient(gradient, x)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: FunctionCtx, second: Tensor) -> tuple[Tensor, Tensor]:
        gradient, x = ctx.saved_tensors
        return F.linear(x, second), gradient @ second


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weightᵀ + bias, as F.linear: x [..., K], weight [N, K], bias [N] → [..., N]; by oneDNN where that is faster."""
    if not BY_ONEDNN or not (torch.compiler.is_compiling() or is_large(x, weight)):  # compiled, the operator decides
        return F.linear(x, weight, bias)
    plain = type(x) is Tensor and type(weight) in (Tensor, nn.Parameter)  # not distributed or quantised, for example
    fits = x.dtype == weight.dtype == torch.float32 and x.device.type == "cpu" and weight.is_contiguous()
    fits = fits and x.shape[-1] == weight.shape[1] and (bias is None or bias.shape == weight.shape[:1])
    transformed = forward_ad._current_level >= 0 or torch._C._are_functorch_transforms_active()  # jvp, vmap
    if not plain or not fits or transformed or torch.is_autocast_enabled("cpu"):
        return F.linear(x, weight, bias)
    return _Product.apply(x, weight, bias)


class Linear(nn.Linear):
    """nn.Linear, its products by `linear`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)
