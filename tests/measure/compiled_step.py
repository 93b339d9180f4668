"""What torch.compile makes of a training step, without a GPU: python -m tests.measure.compiled_step

Kernels, bytes and FLOPs of forward and backward pass of 32 images of 256 pixels in bfloat16: the network's parts are
traced on a fake GPU, split into the two passes, lowered and fused by inductor as for an H100, and counted before
anything is generated. A kernel's time is predicted as the longer of its arithmetic and its traffic at the rates below.
Embedding, loss and what joins the parts are left out. What inductor decides by trying on a GPU is off: padded products,
and patterns of attention (of the plain network's it finds none on a CPU either).
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import NamedTuple
from unittest import mock

import torch
from torch import Tensor, fx, nn
from torch._dynamo.device_interface import CudaInterface
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._guards import detect_fake_mode
from torch._inductor import config as inductor_config
from torch._inductor.compile_fx import _recursive_joint_graph_passes, _recursive_post_grad_passes
from torch._inductor.debug import DebugContext
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.fx_passes.joint_graph import lazy_init
from torch._inductor.graph import GraphLowering
from torch._inductor.scheduler import BaseSchedulerNode
from torch._inductor.virtualized import V
from torch.func import functional_call
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn import functional as F
from torch.utils._pytree import tree_map
from torch.utils.flop_counter import flop_registry

from pixnerd import SIZES, PixNerd, plain
from pixnerd.cost import state_bytes
from pixnerd.encodings import coordinate_table
from pixnerd.fields import PATCHES_PER_PIECE, NeuralFieldHead
from pixnerd.layers import rotary_table

from ..fake_gpu import CUDA, backward, fake_gpu

BF16 = torch.bfloat16  # the precision of the package's tokens under autocast
IMAGES, SIDE = 32, 256
ROWS = SIDE // 16
MATMUL = 750e12  # FLOP/s in bfloat16, assumed of both GPUs
RATES = {"H100": 2.8e12, "H200": 4.1e12}  # bytes/s: what an H100 reaches of its 3.35 TB/s; measured on an H200
H100 = SimpleNamespace(
    **{"name": "NVIDIA H100", "major": 9, "minor": 0, "multi_processor_count": 132, "warp_size": 32},
    **{"total_memory": 80 << 30, "L2_cache_size": 50 << 20, "regs_per_multiprocessor": 65536},
    **{"max_threads_per_multi_processor": 2048, "max_threads_per_block": 1024},
    **{"shared_memory_per_multiprocessor": 233472, "shared_memory_per_block_optin": 232448},
)
UPDATE = {"gradient norm": 4, "clipping": 8, "AdamW": 28, "moving average": 12}  # bytes read and written a weight


class Cost(NamedTuple):
    """Of some kernels."""

    kernels: int = 0
    bytes: int = 0
    flops: int = 0
    seconds: tuple[float, ...] = (0.0,) * len(RATES)
    saved: int = 0
    """bytes of activations kept for the backward pass"""
    copies: int = 0
    """bytes of weights in bfloat16 kept for it"""

    def __add__(self, other: "Cost") -> "Cost":
        seconds = tuple(map(sum, zip(self.seconds, other.seconds, strict=True)))
        saved, copies = self.saved + other.saved, self.copies + other.copies
        return Cost(*map(sum, zip(self[:3], other[:3], strict=True)), seconds, saved, copies)

    def __mul__(self, times: int) -> "Cost":
        return sum(itertools.repeat(self, times), Cost())


@contextlib.contextmanager
def h100() -> Iterator[None]:
    """Inductor finds an H100 when it asks for the GPU that it compiles for."""
    answers = {
        "get_device_properties": lambda device=None: H100,
        "get_compute_capability": lambda device=None: 90,
        "current_device": lambda: 0,
        "is_available": lambda: True,
    }
    with contextlib.ExitStack() as stack:
        for name, answer in answers.items():
            for where in (torch.cuda, CudaInterface, CudaInterface.Worker):
                if hasattr(where, name):
                    stack.enter_context(mock.patch.object(where, name, staticmethod(answer)))
        stack.enter_context(mock.patch("torch.cuda.device_count", return_value=1))
        stack.enter_context(mock.patch("torch._inductor.scheduler.has_triton", return_value=True))
        stack.enter_context(mock.patch("torch.cuda.get_device_capability", return_value=(9, 0)))
        yield


def read_patterns() -> None:
    """Once, and before any fake GPU: inductor traces the patterns that it looks for, such as that of attention."""
    lazy_init(None)


def lowered(graph: fx.GraphModule) -> Cost:
    """What inductor makes of a graph of a forward or a backward pass."""
    inputs = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    with h100(), V.set_fake_mode(detect_fake_mode(inputs)):
        _recursive_post_grad_passes(graph, is_inference=False)
        lowering = GraphLowering(graph, example_inputs=inputs)
        with V.set_graph_handler(lowering), V.set_debug_handler(DebugContext()):
            lowering.run(*inputs)
            lowering._update_scheduler()
            total = Cost()
            for node in lowering.scheduler.nodes:
                moved, flops = node.get_read_write_buffers_sizes(), flops_of(node)
                if moved:
                    seconds = tuple(max(flops / MATMUL, moved / rate) for rate in RATES.values())
                    total += Cost(1, moved, flops, seconds)
    return total


def flops_of(node: BaseSchedulerNode) -> int:
    """Also of attention and of the package's own operators, which inductor itself does not count."""
    if (found := node.estimate_flops()) is not None:
        return found
    called = getattr(node.node, "fx_node", None)
    count = flop_registry.get(getattr(called.target, "overloadpacket", None)) if called is not None else None
    if count is None:
        return 0
    args, kwargs = tree_map(lambda x: x.meta["val"] if isinstance(x, fx.Node) else x, (called.args, called.kwargs))
    return count(*args, **kwargs, out_val=called.meta["val"])


def traced(function: Callable, primals: list[Tensor], tangents: list[Tensor]) -> fx.GraphModule:
    torch.clear_autocast_cache()
    graph = make_fx(function, decomposition_table=select_decomp_table())(primals, tangents)
    graph.graph.eliminate_dead_code()
    graph.recompile()
    return graph


def forward(function: Callable[..., Tensor], inputs: list[Tensor]) -> Cost:
    """The forward pass alone."""
    return lowered(traced(lambda primals, tangents: [function(*primals)], inputs, []))


def forward_and_backward(
    function: Callable[..., Tensor], inputs: list[Tensor], parameters: int, without_gradient: int = 0
) -> Cost:
    """Both passes; the last `parameters` inputs are weights, the first `without_gradient` need no gradient."""

    def joint(primals: list[Tensor], tangents: list[Tensor]) -> list[Tensor]:
        leaves = [x.detach().requires_grad_(place >= without_gradient) for place, x in enumerate(primals)]
        out = function(*leaves)
        found = backward(out, tangents[0])
        return [out, *(found[leaf] for leaf in leaves[without_gradient:])]

    graph = traced(joint, inputs, [torch.empty_like(function(*inputs))])
    measuring = {"joint_graph_constant_folding": False, "shape_padding": False}  # both compute on the GPU
    with h100(), inductor_config.patch(measuring):
        _recursive_joint_graph_passes(graph)
    passes = min_cut_rematerialization_partition(graph, None, compiler="inductor", num_fwd_outputs=1)
    activations, weights = len(inputs) - parameters, inputs[len(inputs) - parameters :]
    shapes = {tuple(sorted(weight.shape)) for weight in weights}
    saved = copies = 0
    for node in set(passes[0].graph.output_node().args[0][1:]):
        value = node.meta["val"]
        if node.op == "placeholder":  # primals_1, primals_2, …
            saved += value.nbytes if int(node.name.split("_")[1]) <= activations else 0
        elif isinstance(value, Tensor):
            is_copy = tuple(sorted(value.shape)) in shapes
            saved, copies = saved + value.nbytes * (not is_copy), copies + value.nbytes * is_copy
    return lowered(passes[0]) + lowered(passes[1]) + Cost(saved=saved, copies=copies)


def of_module(module: nn.Module, call: Callable, inputs: list[Tensor], parameters: list[str], fixed: int = 0) -> tuple:
    """`forward_and_backward`'s arguments for a call of a module with inputs and its named parameters as leaves."""
    values = dict(module.named_parameters())

    def function(*leaves: Tensor) -> Tensor:
        given, weights = leaves[: len(inputs)], dict(zip(parameters, leaves[len(inputs) :], strict=True))
        return call(module, weights, *given)

    return function, [*inputs, *(values[name] for name in parameters)], len(parameters), fixed


class Decode(nn.Module):
    """`NeuralFieldHead.decode` as a module's forward."""

    def __init__(self, head: NeuralFieldHead):
        super().__init__()
        self.head = head

    def forward(self, *given: Tensor) -> Tensor:
        return self.head.decode(*given)


def package_blocks(model: PixNerd) -> Cost:
    """All blocks; `compile_regions` compiles one."""
    config = model.config
    cos, sin = rotary_table(ROWS, ROWS, (16, 16), config.width // config.heads, torch.float32, CUDA)
    block = model.blocks[0]
    x, c = torch.empty(IMAGES, ROWS**2, config.width, dtype=BF16), torch.empty(IMAGES, config.width)

    def transform(module: nn.Module, weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        return functional_call(module, weights, (*given[2:], given[:2]))

    names = list(dict(block.named_parameters()))
    return forward_and_backward(*of_module(block, transform, [cos, sin, x, c], names, 2)) * config.blocks


def package_head(model: PixNerd, kernel: str, recompute: str) -> Cost:
    """The head as `compile_regions` compiles it, and what generates its weights, which runs outside, by itself."""
    config, patches, total = model.config, IMAGES * ROWS**2, Cost()
    W, ratio = config.field_width, config.field_ratio
    head = NeuralFieldHead(config.width, 3, W, config.field_blocks, ratio, kernel=kernel)
    table = coordinate_table(config.encoding, 16, 16, torch.float32, CUDA)
    decode, s = Decode(head), torch.empty(patches, config.width, dtype=BF16)
    generators = [f"head.blocks.{number}.generator" for number in range(config.field_blocks)]
    for number, generator in enumerate(field.generator for field in head.blocks):
        found = forward_and_backward(F.linear, [s, generator.weight, generator.bias], 2)
        total += found if number == 0 else found._replace(saved=0)  # all keep the same s
    shared = [name for name, _ in decode.named_parameters() if not name.startswith(tuple(generators))]

    def call(module: nn.Module, weights: dict[str, Tensor], *given: Tensor) -> Tensor:
        return functional_call(module, weights, given)

    def of_patches(number: int) -> tuple:
        generated = [torch.empty(number, 2 * ratio * W**2, dtype=BF16) for _ in head.blocks]
        given = [torch.empty(number, 256, 3), table, *generated]
        return of_module(decode, call, given, shared, 2)

    if recompute == "none":
        return total + forward_and_backward(*of_patches(patches))
    again = of_patches(PATCHES_PER_PIECE)
    kept = sum(again[1][place].nbytes for place in (0, *range(2, 2 + len(head.blocks))))  # what decodes again
    piece = forward(*again[:2]) + forward_and_backward(*again)._replace(saved=kept, copies=0)
    return total + piece * (patches // PATCHES_PER_PIECE)


def plain_blocks(model: PixNerd) -> Cost:
    """All of the plain network's blocks; one is compiled. Its tokens are float32, since it adds biases in float32."""
    config, block = model.config, model.blocks[0]
    x, c = torch.empty(IMAGES, ROWS**2, config.width), torch.empty(IMAGES, config.width)

    def transform(module: nn.Module, weights: dict[str, Tensor], x: Tensor, c: Tensor) -> Tensor:
        return plain.dit_block(weights, config.heads, x, c, (ROWS, ROWS))

    names = list(dict(block.named_parameters()))
    return forward_and_backward(*of_module(block, transform, [x, c], names)) * config.blocks


def plain_head(model: PixNerd) -> Cost:
    """The plain network's head, compiled."""
    config, head, patches = model.config, model.head, IMAGES * ROWS**2

    def decode(module: nn.Module, weights: dict[str, Tensor], table: Tensor, pixels: Tensor, s: Tensor) -> Tensor:
        with mock.patch.object(plain, "patch_coordinates", return_value=table):  # it would make real numbers
            return plain.field_head(weights, config, pixels, s)

    pixels, s = torch.empty(patches, 256, 3), torch.empty(patches, config.width)
    names = list(dict(head.named_parameters()))
    table = coordinate_table(config.encoding, 16, 16, torch.float32, CUDA)
    return forward_and_backward(*of_module(head, decode, [table, pixels, s], names, 2))


def main() -> None:
    print(f"torch {torch.__version__}; {IMAGES} images; {MATMUL:g} FLOP/s and {RATES} bytes/s")
    columns = f"{'kernels':>8}{'GB':>8}{'TFLOP':>8}{'kept, GB':>10}{'an image, MB':>14}{'all, GB':>9}"
    print(f"{'':40}{columns}   ms: {', '.join(RATES)}")
    read_patterns()
    ways = [("torch", "none"), ("torch", "head"), ("fused", "none")]
    for size in ("L/16", "XL/16"):
        with fake_gpu(), CUDA:
            model = PixNerd(SIZES[size], 1000, "none")
            weights = sum(parameter.numel() for parameter in model.parameters())
            moved, state = weights * sum(UPDATE.values()), state_bytes(model)
            update = Cost(0, moved, 0, tuple(moved / rate for rate in RATES.values()))
            blocks = {"plain": plain_blocks(model), "package": package_blocks(model)}
            heads = {"plain": plain_head(model)}
            heads |= {f"package, {one}, recompute {other}": package_head(model, one, other) for one, other in ways}
        rows = {f"head alone, {name}": cost for name, cost in heads.items()} | {"update alone": update}
        rows |= {name: blocks[name.split(",")[0]] + cost + update for name, cost in heads.items()}
        for name, cost in rows.items():
            kept = cost.saved + cost.copies
            numbers = f"{cost.kernels:8}{cost.bytes / 1e9:8.1f}{cost.flops / 1e12:8.1f}{kept / 1e9:10.1f}"
            numbers += f"{cost.saved / IMAGES / 1e6:14.0f}{(kept + state) / 1e9:9.1f}   "
            print(f"{size:6}{name:34}{numbers}{', '.join(f'{1e3 * s:.1f}' for s in cost.seconds)}", flush=True)


if __name__ == "__main__":
    main()
