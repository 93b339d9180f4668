"""What a training run reports: losses, gradient norms and speed, for log.jsonl and TensorBoard."""

import contextlib
import time
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import TrainConfig
from ..cost import forward_flops, matmul_rate
from ..distributed import World, full_tensor
from ..files import writing
from ..runs import Run
from ..text import build_network


class Bad(NamedTuple):
    """What became infinite or not a number."""

    what: str  # loss or gradient
    ago: int  # steps ago, 1 = the last step


class StepPart(NamedTuple):
    """What one process measured in a part of a step."""

    per_image: Tensor  # [B] velocity losses
    terms: dict[str, Tensor]  # the other terms by name, 0-dim each


class LossWindow:
    """The losses since the last log entry: their mean, and the mean for each tenth of t in [0, 1].

    Every list has one entry per step; a step that was skipped is only counted. `sums` and `restored` carry it over an
    interruption, so that a resumed run logs what one that never stopped does.
    """

    def __init__(self) -> None:
        self.losses: list[Tensor] = []  # 0-dim each, averaged over all processes
        self.norms: list[Tensor] = []  # 0-dim each, of the full gradient before clipping
        self.parts: list[list[StepPart]] = []  # of this process
        self.times: list[Tensor] = []  # [B] each, of this process
        self.skipped = 0
        self.before: dict[str, Any] = {"steps": 0, "sums": [0.0] * 10, "counts": [0] * 10, "terms": {}}

    @classmethod
    def restored(cls, sums: dict[str, Any] | None, world: World) -> "LossWindow":
        """The window of an interrupted run, from what `sums` returned; an empty one for None."""
        window = cls()
        if sums:
            window.before = sums
            for values, name in ((window.losses, "losses"), (window.norms, "norms")):
                values += [torch.tensor(value, device=world.device) for value in sums[name]]
            window.skipped = sums["skipped"]
        return window

    def sums(self, world: World) -> dict[str, Any]:
        """What `restored` needs, as JSON can keep it. Every process has to call it."""
        sums, counts = self._by_tenth(world)
        return {
            "steps": self.steps,
            "skipped": self.skipped,
            "losses": torch.stack(self.losses).tolist() if self.losses else [],
            "norms": torch.stack(self.norms).tolist() if self.norms else [],
            "sums": sums.tolist(),
            "counts": counts.tolist(),
            "terms": {name: values.tolist() for name, values in self._terms(world).items()},
        }

    def add_step(self, loss: Tensor, norm: Tensor, parts: list[StepPart], t: Tensor) -> None:
        """Add the loss of a step over all processes, its gradient norm, and this process's parts and times [B]."""
        self.losses.append(loss)
        self.norms.append(full_tensor(norm))
        self.parts.append(parts)
        self.times.append(t)

    def skip_step(self) -> None:
        """Forget the values of the last step, and count it."""
        for values in (self.losses, self.norms, self.parts, self.times):
            values.pop()
        self.skipped += 1

    @property
    def steps(self) -> int:
        """Steps since the last log entry, skipped ones included."""
        return len(self.losses) + self.skipped

    @property
    def steps_here(self) -> int:
        """Those of them that this program made, and not the one that was interrupted."""
        return self.steps - self.before["steps"]

    def first_bad(self) -> Bad | None:
        """The first loss or gradient that is not finite; None if all are finite."""
        kinds = {"loss": self.losses, "gradient": self.norms}
        finite = {what: torch.stack(values).isfinite().tolist() for what, values in kinds.items()}
        steps = len(self.losses)
        bad = [Bad(what, steps - step) for step in range(steps) for what in kinds if not finite[what][step]]
        return bad[0] if bad else None

    def summary(self, world: World) -> dict[str, Any]:
        """loss, gradient_norm and the largest one, the other terms by name, and loss_by_t: ten means, None for a tenth
        without images.

        If every step was skipped, all are None. Every process has to call it.
        """
        if not self.losses:
            return {"loss": None, "gradient_norm": None, "largest_gradient_norm": None, "loss_by_t": [None] * 10}
        total, count = self._by_tenth(world)
        by_t = [round(float(a / n), 6) if n else None for a, n in zip(total, count, strict=True)]
        means = {"loss": torch.stack(self.losses).mean(), "gradient_norm": torch.stack(self.norms).mean()}
        means["largest_gradient_norm"] = torch.stack(self.norms).max()
        means |= {name: values.mean() for name, values in self._terms(world).items()}
        return {**{name: float(value) for name, value in means.items()}, "loss_by_t": by_t}

    def _by_tenth(self, world: World) -> tuple[Tensor, Tensor]:
        """The sum of the images' losses in each tenth of t, float64 [10], and the number of images, [10]."""
        sums = torch.tensor(self.before["sums"], dtype=torch.float64)
        counts = torch.tensor(self.before["counts"])
        if self.times:
            losses = torch.cat([part.per_image for step in self.parts for part in step])
            per_image, t = (world.gather(values).cpu() for values in (losses, torch.cat(self.times)))
            tenth = (10 * t).long().clamp(max=9)
            sums += torch.bincount(tenth, per_image.double(), minlength=10)
            counts += torch.bincount(tenth, minlength=10)
        return sums, counts

    def _terms(self, world: World) -> dict[str, Tensor]:
        """The other terms by name, [parts of steps], averaged over all processes."""
        found = {name: torch.tensor(values, device=world.device) for name, values in self.before["terms"].items()}
        parts = [part.terms for step in self.parts for part in step]
        for name in dict.fromkeys(name for terms in parts for name in terms):
            values = world.mean(torch.stack([terms[name] for terms in parts if name in terms]))
            found[name] = torch.cat([found[name], values]) if name in found else values
        return found


class SpeedMeter:
    """The speed of a training run, and how well it uses the devices.

    A step counts as three forward passes, the usual estimate of forward and backward; recomputation to save memory does
    not count. Full utilisation is the speed of a large matrix product on this device.
    """

    def __init__(self, config: TrainConfig, num_classes: int | None, dtype: torch.dtype, world: World):
        with torch.device("meta"):
            model = build_network(config.model, num_classes).eval()
        flops = [forward_flops(model, size) for size in config.image_sizes]
        self.flops = 3 * sum(flops) / len(flops)  # per image
        self.best = matmul_rate(world.device, dtype) * world.size
        self.device, self.since = world.device, time.perf_counter()

    def read(self, images: int) -> dict[str, float]:
        """The speed since the last reading, given the number of images that all devices processed since then."""
        now = time.perf_counter()
        speed, self.since = images / (now - self.since), now
        entry = {
            "images_per_second": round(speed, 2),
            "tflops": round(speed * self.flops / 1e12, 4),
            "utilisation": round(speed * self.flops / self.best, 4),
        }
        if self.device.type == "cuda":
            entry["memory_gib"] = round(torch.cuda.max_memory_allocated(self.device) / 2**30, 2)
        return entry


class Board:
    """TensorBoard's copy of log.jsonl, continued after `step`."""

    def __init__(self, run: Run, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.folder = run.folder / "tensorboard"
        with writing(self.folder):
            self.writer = SummaryWriter(self.folder, purge_step=step + 1)

    def add(self, entry: dict[str, Any]) -> None:
        """Raises WriteError, sometimes only for an earlier entry: its thread writes them."""
        tenths = {f"loss_by_t/{i / 10:.1f}": loss for i, loss in enumerate(entry["loss_by_t"]) if loss is not None}
        with writing(self.folder):
            for name, value in {**entry, **tenths}.items():
                if isinstance(value, float):
                    self.writer.add_scalar(name, value, entry["step"])

    def close(self) -> None:
        """Write what is left; a full disk then costs the copy a few entries and hides no other error."""
        with contextlib.suppress(OSError):
            self.writer.close()
