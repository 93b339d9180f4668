"""What the processes of test_nodes.py do: four of them, as two nodes of two.

torchrun -m tests.training.nodes_worker FOLDER
"""

import json
import os
import sys
from collections import defaultdict
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from pixnerd.distributed import join, leave, local_part
from pixnerd.model import ModelConfig
from pixnerd.training import TrainConfig, loop, train

STEPS = 6
MODEL = ModelConfig(width=16, heads=2, blocks=2, patch_size=8, image_size=16, field_width=4, field_blocks=1)
CPU = torch.device("cpu")


def config(folder: Path, name: str, **changes) -> TrainConfig:
    options = {"steps": STEPS, "batch_size": 8, "learning_rate": 1e-2, "checkpoint_every": 3, "accumulate": 2}
    options |= {"shard": True, "precision": "bfloat16", "clip": 0.05, "ema_decay": 0.9, "noise": "philox"}
    return TrainConfig(out=str(folder / name), data="synthetic", model=MODEL, **options | changes)


def losses(config: TrainConfig, stop: int | None = None) -> list[float]:
    """The losses of the remaining steps, up to step `stop`."""
    found = []
    for record in train(config, CPU):
        found.append(float(record.loss))
        if record.step == stop:
            break
    return found


def watch() -> dict[str, set[str]]:
    """From now on, note the precision of weights while they compute, of what is exchanged and of what is updated."""
    seen = defaultdict(set)
    exchanges = {
        "gathered": ("all_gather_into_tensor", "all_gather_single"),  # the second name is that of newer versions
        "scattered": ("reduce_scatter_tensor", "reduce_scatter_single"),
        "averaged": ("all_reduce",),
    }
    for name, functions in exchanges.items():
        for function in filter(partial(hasattr, dist), functions):
            original = getattr(dist, function)

            def watched(*tensors, name=name, original=original, **options):
                output = options.get("output", tensors[0] if tensors else None)
                if output.numel() > 100:  # not the losses
                    seen[name].add(f"{output.dtype} over {dist.get_world_size(options.get('group'))}")
                return original(*tensors, **options)

            setattr(dist, function, watched)

    def note(module, inputs):
        if isinstance(module, nn.Linear) and torch.is_grad_enabled():
            seen["computing"].add(str(module.weight.dtype))

    nn.modules.module.register_module_forward_pre_hook(note)
    update = loop.update_weights

    def update_weights(job, state):
        for parameter in state.models["model"].parameters():
            seen["updated"].add(f"{parameter.dtype}, gradient {parameter.grad.dtype}")
            seen["placed"].add(f"{parameter.placements}, mesh {tuple(parameter.device_mesh.shape)}")
        weights = state.models["model"].blocks[0].mlp.out.weight
        seen["held"].add(f"{local_part(weights).numel() / weights.numel()}")
        return update(job, state)

    loop.update_weights = update_weights
    return seen


def main(folder: Path) -> None:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    found = {"float32": losses(config(folder, "float32", precision="float32"))}
    seen = watch()
    found["straight"] = losses(config(folder, "straight"))
    if join(CPU).leads:
        (folder / "seen.json").write_text(json.dumps({name: sorted(values) for name, values in seen.items()}))
    found["resumed"] = losses(config(folder, "resumed"), stop=4) + losses(config(folder, "resumed"))
    if join(CPU).leads:
        (folder / "losses.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    leave()
