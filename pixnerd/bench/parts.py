"""What the parts of a training step cost, each by itself on the shapes that it has in the step."""

from collections.abc import Callable, Iterator

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from ..encodings import coordinate_table
from ..fields import FieldBlock, NeuralFieldHead
from ..layers import rotary_table
from ..model import PixNerd
from ..training.batches import Batch
from ..training.loop import update_averages
from .contestants import Bench, Contestant


def forward_and_backward(
    function: Callable[..., Tensor | tuple[Tensor, ...]],
    inputs: tuple[Tensor, ...],
    module: nn.Module,
    device: str,
    bf16: bool,
) -> Callable[[], None]:
    """An action: `function(*inputs)` and the gradients of the inputs and of the module's weights that took part."""
    leaves = tuple(x.detach().requires_grad_() for x in inputs)
    wanted = [*leaves, *module.parameters()]

    def action() -> None:
        with torch.autocast(device, torch.bfloat16, enabled=bf16):
            found = function(*leaves)
        outputs = [y for y in (found if isinstance(found, tuple) else (found,)) if y.requires_grad]
        torch.autograd.grad(outputs, wanted, [torch.ones_like(y) for y in outputs], allow_unused=True)

    return action


def network_parts(network: PixNerd, batch: Batch, bf16: bool) -> dict[str, Callable[[], None]]:
    """Embedding, blocks and head of a network, and the weight generation within the head, forward and backward."""
    config, device = network.config, batch.image.device
    P, D, (images, _, height, width) = config.patch_size, config.width, batch.image.shape
    rows, columns = height // P, width // P
    kind = {"device": device, "dtype": torch.bfloat16 if bf16 else torch.float32}
    patches = rearrange(batch.image, "b c (h p) (w q) -> b (h w) (c p q)", p=P, q=P)
    pixels = rearrange(batch.image, "b c (h p) (w q) -> (b h w) (p q) c", p=P, q=P)
    tokens, c = torch.randn(images, rows * columns, D, **kind), torch.randn(images, D, **kind)
    s = F.silu(tokens).flatten(0, 1)
    rotary = rotary_table(rows, columns, network.rotary_ends(rows, columns), D // config.heads, torch.float32, device)

    def embed() -> tuple[Tensor, ...]:
        return network.patch_embed(patches), F.silu(network.time_embed(batch.t) + network.label_embed(batch.condition))

    def transform(tokens: Tensor, c: Tensor) -> Tensor:
        for block in network.blocks:
            tokens = block(tokens, c, rotary)
        return tokens

    def generate(s: Tensor) -> tuple[Tensor, ...]:
        return tuple(matrix for block in network.head.blocks for matrix in block.weights(s))

    def decode(s: Tensor) -> Tensor:
        if not isinstance(network.head, NeuralFieldHead):
            return network.head(pixels, s, (P, P), False)
        generated = [block.generate(s) for block in network.head.blocks]
        return network.head.decode(pixels, coordinate_table(config.encoding, P, P, torch.float32, device), *generated)

    def action(function: Callable, *inputs: Tensor, of: nn.Module = network) -> Callable[[], None]:
        return forward_and_backward(function, inputs, of, device.type, bf16)

    parts = {
        "embedding": action(embed),
        "blocks": action(transform, tokens, c, of=network.blocks),
        "head": action(decode, s, of=network.head),
    }
    if all(isinstance(block, FieldBlock) for block in getattr(network.head, "blocks", [None])):
        parts["weight generation"] = action(generate, s, of=network.head)
    return parts


def step_parts(bench: Bench, contestant: Contestant, network: PixNerd) -> dict[str, Callable[[], object]]:
    """Every part of a training step as an action, the whole gradient among them; `input` draws a batch of its own."""
    state, run = bench.states[contestant.kind], bench.job(contestant).config
    batches: Iterator[Batch] = bench.new_batches()
    bench.gradient(contestant, network)()  # optimiser and clipping need one
    parameters = list(network.parameters())

    def clip() -> None:
        norm = nn.utils.get_total_norm([parameter.grad for parameter in parameters if parameter.grad is not None])
        nn.utils.clip_grads_with_norm_(parameters, run.clip or 1.0, norm)

    return {
        "step": bench.training_step(contestant, network),
        "input": lambda: next(batches),
        "gradient": bench.gradient(contestant, network),
        **network_parts(network, bench.batch, contestant.precision == "bfloat16"),
        "gradient norm": clip,
        "optimiser": state.optimizer.step,
        "moving averages": lambda: update_averages(state.models, run, 3),
    }
