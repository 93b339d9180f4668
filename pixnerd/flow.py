"""Flow matching: the straight path from noise to data, its velocity, the training times, the loss.

t = 0 is noise and t = 1 is data. Sources: Lipman et al. 2210.02747 (flow matching), Liu et al. 2209.03003 (straight
paths), Esser et al. 2403.03206 (logit-normal times, shift), Li & He 2511.13720 (image prediction with velocity loss).
Dimension letters: B images, C channels, H × W pixels.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .model import PatchDenoiser
from .model import velocity_from_image as velocity_from_image

LOSS_CLAMP = 0.05  # the loss of an x-predicting model takes 1 − t for no smaller than this


def interpolate(image: Tensor, noise: Tensor, t: Tensor) -> Tensor:
    """The path x_t = t·image + (1 − t)·noise. image and noise [B, C, H, W], t [B] in [0, 1]."""
    t = t.view(-1, 1, 1, 1)
    return t * image + (1 - t) * noise


def velocity(image: Tensor, noise: Tensor) -> Tensor:
    """The path's derivative in t, image − noise, constant along it: what the network learns. [B, C, H, W]."""
    return image - noise


def clean_image(x_t: Tensor, v: Tensor, t: Tensor) -> Tensor:
    """Where the velocity v at x_t leads: x̂ = x_t + (1 − t)·v. x_t and v [B, C, H, W], t [B] in [0, 1]."""
    return x_t + (1 - t).view(-1, 1, 1, 1) * v


def shift_time(t: Tensor, shift: float) -> Tensor:
    """t / (t + (1 − t)·shift): keeps 0 and 1; shift > 1 moves everything between towards the noise."""
    return t / (t + (1 - t) * shift)


def logit_normal_time(normal: Tensor, shift: float = 1.0) -> Tensor:
    """Training times from standard normal numbers of any shape: sigmoid(normal), shifted; inside (0, 1)."""
    return shift_time(torch.sigmoid(normal), shift)


class FlowLoss(NamedTuple):
    """The results of one evaluation of the loss."""

    mean: Tensor  # 0-dim, the loss to minimise
    per_image: Tensor  # [B], detached, for the loss by t
    clean: Tensor  # [B, C, H, W], x̂: the image to which the estimated velocity leads
    tokens: Tensor | None = None  # [B, N, D], the output of the tapped block


def mean_square(error: Tensor) -> Tensor:
    """[B, C, H, W] → [B]"""
    return error.square().mean(dim=(1, 2, 3))


def bounded(error: Tensor, t: Tensor, prediction: str) -> Tensor:
    """A velocity error [B, C, H, W] as losses take it: for a model that predicts the image, times (1 − t)/0.05 where
    that is below 1.

    An error of x̂ is an error of v̂ 1/(1 − t) times as large; so the weight of the squared image error stays at or below
    400.
    """
    return error * ((1 - t) / LOSS_CLAMP).clamp(max=1).view(-1, 1, 1, 1) if prediction == "x" else error


def loss(
    model: PatchDenoiser,
    image: Tensor,
    condition: Tensor,
    noise: Tensor,
    t: Tensor,
    base_resolution: tuple[int, int] | None = None,
    measure: Callable[[Tensor], Tensor] = mean_square,
    tap: int | None = None,
) -> FlowLoss:
    """mean((v̂ − v)²) at x_t, with weight 1; for a model that predicts the image see `bounded`.

    Args:
        model: the velocity network.
        image: clean images [B, C, H, W] in [−1, 1].
        condition: what the model is conditioned on: labels [B], or text features [B, L, F].
        noise: standard normal, like image.
        t: times [B] in [0, 1].
        base_resolution: (h, w) that the transformer sees while the head decodes H × W; by default the same.
        measure: maps velocity errors [B, C, H, W] to a loss per image [B]; by default their mean square.
        tap: a block of the network, 1 … blocks, whose tokens are returned as well; by default none.
    """
    x_t = interpolate(image, noise, t)
    tokens = None
    if tap is None:
        estimate = model(x_t, t, condition, base_resolution)
    else:
        estimate, tokens = model(x_t, t, condition, base_resolution, tap)
    per_image = measure(bounded(estimate - velocity(image, noise), t, model.config.prediction))  # [B]
    return FlowLoss(per_image.mean(), per_image.detach(), clean_image(x_t, estimate, t), tokens)
