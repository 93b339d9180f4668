"""The memory traffic of the neural field: python -m tests.measure.field_traffic

Bytes that the head's operators read and write in forward and backward pass of 32 images of 256 pixels in bfloat16,
counted from shapes on a fake GPU; and the registers that the fused kernels take, as compiled for some GPUs.
"""

import re
import subprocess
import tempfile

import torch
import triton
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel

from pixnerd import SIZES, fused
from pixnerd.fields import PATCHES_PER_PIECE, NeuralFieldHead

from ..fake_gpu import CUDA, backward, fake_gpu

IMAGES, PATCHES, PIXELS = 32, 256, 256
SPEED = 2.8e12  # bytes a second, what an H100 reaches of its 3.35 TB/s
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "field_block", "field_block_backward"}


class Traffic(TorchDispatchMode):
    """Bytes of every operator's tensors, and those of matrix products alone; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.all = self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and func.namespace in ("aten", "pixnerd"):
            given = [x for y in (args, (kwargs or {}).values()) for z in y for x in (z if isinstance(z, list) else [z])]
            given += result if isinstance(result, tuple | list) else [result]
            size = sum(min(x.nbytes, x.untyped_storage().nbytes()) for x in given if isinstance(x, Tensor))
            self.all += size
            self.products += size * (func.overloadpacket.__name__ in PRODUCTS)
        return result


def generated_in_pieces(head: NeuralFieldHead, pixels: Tensor, s: Tensor) -> Tensor:
    """The head that generates the weights again, too, as this package did: for comparison."""

    def piece(some_pixels: Tensor, some_s: Tensor) -> Tensor:
        return head(some_pixels, some_s, (16, 16), False)

    parts = zip(pixels.split(PATCHES_PER_PIECE), s.split(PATCHES_PER_PIECE), strict=True)
    return torch.cat([checkpoint(piece, *part, use_reentrant=False, preserve_rng_state=False) for part in parts])


def traffic(size: str, kernel: str, recompute: str) -> Traffic:
    """Of one forward and backward pass of the head of a published size."""
    config = SIZES[size]
    with fake_gpu(), CUDA:
        head = NeuralFieldHead(config.width, 3, blocks=config.field_blocks, kernel=kernel)
        pixels = torch.empty(IMAGES * PATCHES, PIXELS, 3)
        s = torch.empty(IMAGES * PATCHES, config.width, requires_grad=True)
        with Traffic() as counted:
            if recompute == "with weights":
                out = generated_in_pieces(head, pixels, s)
            else:
                out = head(pixels, s, (16, 16), recompute == "head")
            backward(out.float().sum())
    return counted


def compiled(name: str, choice: int, capability: int = 90, dtype: str = "bf16") -> CompiledKernel:
    """A kernel in one of its configurations for fields of 64 by 128, compiled without a GPU."""
    kernel = {"forward": fused.forward_kernel, "backward": fused.backward_kernel}[name]
    config, function = kernel.configs[choice], kernel.fn
    constants = fused._constants(torch.empty(1, PIXELS, 64), torch.empty(1, 2 * 64 * 128), "fc1+fc2") | config.kwargs
    del constants["pixels"]
    types = {"pixels": "i32", "gain_at": "*fp32", "dgain_at": "*fp32"}
    names = function.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, f"*{dtype}") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name not in constants}
    source = ASTSource(function, signature, {(names.index(name),): value for name, value in constants.items()}, aligned)
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def resources(kernel: CompiledKernel) -> str:
    """What a thread takes: registers, and bytes of memory for what did not fit into them."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(kernel.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = (re.search(rf"{what}:(\d+)", said)[1] for what in ("REG", "STACK"))
    return f"{registers} registers, {stack} bytes outside, {kernel.metadata.shared / 1024:.0f} KiB shared"


def main() -> None:
    print(f"torch {torch.__version__}, triton {triton.__version__}; {IMAGES} images; GB, and ms at {SPEED:g} bytes/s")
    for size in ("L/16", "XL/16"):
        for kernel, recompute in (
            ("torch", "none"), ("torch", "with weights"), ("torch", "head"), ("fused", "none"), ("fused", "head")
        ):  # fmt: skip
            found = traffic(size, kernel, recompute)
            numbers = "".join(f"{x / 1e9:9.1f}{1000 * x / SPEED:7.1f}" for x in (found.all, found.products))
            print(f"{size:6} {kernel:6} {recompute:13}{numbers}", flush=True)
    kernels = (("forward", fused.FORWARD), ("backward", fused.BACKWARD))
    for gpu, capability in (("A100", 80), ("RTX 4090", 89), ("H100", 90)):
        for name, configs in kernels:
            for choice, config in enumerate(configs):
                used = resources(compiled(name, choice, capability))
                print(f"{gpu}: {name}, {config.kwargs['PIXELS']} pixels, {config.num_warps} warps: {used}", flush=True)


if __name__ == "__main__":
    main()
