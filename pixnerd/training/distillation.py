"""Few-step students: what turns a velocity network, the teacher, into a network of mean velocities, its student.

u(x_t, t, r) is the mean of the velocity over [t, r] along the path through x_t, so x_r = x_t + (r − t)·u in one step
however long, and u(x, t, t) = v. Three objectives find it: two half steps are one step (shortcut models, Frans et al.
2410.12557), the equation of the mean velocity (MeanFlow, Geng et al. 2505.13447), and the Fréchet distance between the
features of one-step images and of real ones (FD-loss, 2604.28190). The student's head is told r and its blocks t, the
split of decoupled MeanFlow (2510.24474), which adds no weights.

Dimension letters: B images, C channels, H × W pixels, F features. t = 0 is noise and t = 1 is data.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .. import data, flow, frozen
from ..conditions import Conditions
from ..config import SamplingConfig, TrainConfig
from ..data import ImageDataset
from ..distributed import World
from ..flow import FlowLoss
from ..frozen.network import FrozenNetwork
from ..metrics.features import check_shared, collect
from ..model import PatchDenoiser
from ..sampling import trajectory
from .batches import SHORTCUTS, Batch
from .losses import Networks, Objective, VelocityLoss, base_resolution

PATH_STEPS = 16  # of Euler, with which shortcut distillation follows its teacher; a power of 2, 8 or more
FLAT = 1e-3  # of the mean variance of a feature: below it, FD-loss takes a direction for flat
LAST = [place for place, (_, r) in enumerate(SHORTCUTS) if r == 1]  # the intervals of a path that end on an image
BATCH = 64  # real images whose features FD-loss computes at a time
MeanVelocity = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x [B, …], t [B], r [B]) → u [B, …]


# --- mean velocities -------------------------------------------------------------------------------------------------


def along(time: Tensor, x: Tensor) -> Tensor:
    """Times [B] in the shape [B, 1, …] that broadcasts with x [B, …]."""
    return time.view(-1, *[1] * (x.ndim - 1))


def twice_as_long(u: Tensor) -> Tensor:
    """Two half steps are one step: the mean velocities [n, …] over n neighbouring intervals of one length give those
    over n/2 intervals twice as long, ½·[u(x_t, t, m) + u(x_m, m, r)] where m = (t + r)/2.

    Along one path, where x_m is where the first half leads.
    """
    return (u[0::2] + u[1::2]) / 2


def total_derivative(u: MeanVelocity, v: Tensor, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """du/dt = ∂u/∂x·v + ∂u/∂t, along the path whose velocity at x_t is v, by forward-mode differentiation; [B, …].

    Fused attention has no forward mode, compiled code none either, and a derivative of numbers rounded to bfloat16
    would be noise: all three are off inside. u has to be the network itself: DDP's wrapper is for
    the forward pass whose gradients it exchanges.
    """
    with (
        torch.no_grad(),
        torch.autocast(x.device.type, enabled=False),
        sdpa_kernel(SDPBackend.MATH),
        torch.compiler.set_stance("force_eager"),
    ):
        return torch.func.jvp(lambda x, t: u(x, t, r), (x, t), (v, torch.ones_like(t)))[1]


def mean_velocity(u: MeanVelocity, v: Tensor, x: Tensor, t: Tensor, r: Tensor) -> Tensor:
    """v + (r − t)·du/dt: what u equals at x_t. To regress u on it is to regress u − (r − t)·du/dt on the velocity v.

    x_r = x_t + (r − t)·u does not depend on t along a path; its derivative in t says so. All [B, …], times [B].
    """
    return v + along(r - t, x) * total_derivative(u, v, x, t, r)


def frechet_distance(mean: Tensor, covariance: Tensor, real_mean: Tensor, real_root: Tensor) -> Tensor:
    """The Fréchet distance of two Gaussians, 0-dim, with gradients for the first; see metrics.frechet_distance.

    Means [F], the covariance [F, F] of the first, the root R of the second's, R² = Σ [F, F]. The gradient of an
    eigenvalue needs no gap to the next one. The gradient of its root diverges in directions in which the
    images have no variance, which there always are with fewer than F images; FLAT keeps it finite.
    """
    between = real_root @ covariance @ real_root
    values = torch.linalg.eigvalsh((between + between.T) / 2)
    variance = real_root.square().sum()  # the data's, in all directions
    trace = (values + (FLAT * variance / len(mean)) ** 2).sqrt().sum()
    return (mean - real_mean).square().sum() + covariance.trace() + variance - 2 * trace


# --- distances of features -------------------------------------------------------------------------------------------


class FeatureMoments(nn.Module):
    """Mean and covariance of one network's features: those of the data, and moving averages of the images'."""

    def __init__(self, features: int, device: torch.device):
        super().__init__()
        options = {"dtype": torch.float64, "device": device}
        self.register_buffer("steps", torch.zeros((), **options))  # behind the averages
        for name in ("mean", "real_mean"):
            self.register_buffer(name, torch.zeros(features, **options))  # [F]
        for name in ("products", "real_root"):  # E[f·fᵀ]; R with R² = the data's covariance
            self.register_buffer(name, torch.zeros(features, features, **options))  # [F, F]
        self.next: tuple[Tensor, Tensor] | None = None

    def set_real(self, mean: Tensor, covariance: Tensor) -> None:
        """Keep the data's moments, [F] and [F, F]."""
        values, basis = torch.linalg.eigh(covariance)
        self.real_mean.copy_(mean)
        self.real_root.copy_((basis * values.clamp(min=0).sqrt()) @ basis.T)

    def distance(self, features: Tensor, decay: float, world: World) -> Tensor:
        """The Fréchet distance, over the total variance of the data; 0-dim, with gradients for the features [B, F].

        Its value is that of the moving averages after this batch, and its gradient that of a batch which is all there
        is: 1 − decay would only scale it. The first averages are plain means over all batches so far.
        """
        batch = features.mean(0), features.T @ features / len(features)
        share = (1 / (self.steps + 1)).clamp(min=1 - decay)
        before = self.mean, self.products
        self.next = tuple(
            old + share * (world.mean(new.detach()) - old) for old, new in zip(before, batch, strict=True)
        )
        # the values of the averages, the gradients of the batch
        mean, products = (value + new - new.detach() for value, new in zip(self.next, batch, strict=True))
        covariance = products - torch.outer(mean, mean)
        distance = frechet_distance(mean, covariance, self.real_mean, self.real_root)
        return distance / self.real_root.square().sum()

    def move(self) -> None:
        """Move the averages to where the last batch put them."""
        mean, products = self.next
        self.mean.copy_(mean)
        self.products.copy_(products)
        self.steps += 1


class FeatureDistances:
    """The Fréchet distances between images and the data in features of frozen networks, summed over networks.

    Each is divided by the total variance of the data's features, so that networks of any scale count alike. The moments
    of the images are moving averages; gradients pass through the share of the batch, as if it were all of them.

    Raises:
        InputError: a network is missing, or gives no feature maps.
    """

    def __init__(self, config: TrainConfig, world: World, channels: int):
        self.world, self.decay = world, config.fd_decay
        self.networks = [frozen.load(name, world.device) for name in config.fd_networks]
        blank = torch.zeros(1, channels, *(config.model.image_size,) * 2, device=world.device)
        features = [vectors(network, blank).shape[1] for network in self.networks]
        self.moments = nn.ModuleList(FeatureMoments(count, world.device) for count in features)

    def measure_data(self, dataset: ImageDataset) -> None:
        """Find out the data's moments, which checkpoints keep; every process reads a share of the images.

        Raises InputError in a process that cannot read an image; its end ends the others.
        """
        for network, moments in zip(self.networks, self.moments, strict=True):
            moments.set_real(*real_moments(network, dataset, self.world))

    def __call__(self, images: Tensor) -> Tensor:
        """0-dim, float64; images [B, C, H, W] in about [−1, 1]."""
        total = images.new_zeros((), dtype=torch.float64)
        for network, moments in zip(self.networks, self.moments, strict=True):
            total = total + moments.distance(vectors(network, images), self.decay, self.world)
        return total

    def move(self) -> None:
        """Move the averages to where the last images put them."""
        for moments in self.moments:
            moments.move()


def vectors(network: FrozenNetwork, images: Tensor) -> Tensor:
    """One vector per image [B, F], float64: the means of all feature maps; images [B, C, H, W] in about [−1, 1]."""
    with torch.autocast(images.device.type, enabled=False):  # differences between rounded moments would be noise
        maps = network.maps(images.float().expand(-1, 3, -1, -1))
        return torch.cat([of_map.mean((2, 3)) for of_map in maps], 1).double()


def real_moments(network: FrozenNetwork, dataset: ImageDataset, world: World) -> tuple[Tensor, Tensor]:
    """Mean [F] and covariance [F, F] of a data set's features; each process reads a share of its images."""
    count = len(dataset)
    check_shared(count, BATCH, world)
    starts = range(BATCH * world.rank, count, BATCH * world.size)
    batches = ((start, dataset.batch(range(start, min(start + BATCH, count)))[0]) for start in starts)
    found = collect(lambda pixels: {"maps": vectors(network, data.to_float(pixels))}, batches, count, world, keep=0)
    return found.gaussians["maps"]


# --- the objectives --------------------------------------------------------------------------------------------------


def objective(
    config: TrainConfig, world: World, channels: int, conditions: Conditions, teacher: PatchDenoiser | None
) -> Objective:
    """What a run minimises. Raises InputError when a network that it needs is missing.

    Args:
        config: distil says which.
        world: the processes of the run.
        channels: of the images.
        conditions: what its model is told.
        teacher: the model to distil; None where nothing is.
    """
    if teacher is None:
        return VelocityLoss(config)
    measured = config.distil == "fd" or config.fd_weight
    distances = FeatureDistances(config, world, channels) if measured else None
    if config.distil == "fd":
        return FrechetLoss(config, distances)
    if config.paths:
        return ShortcutLoss(config, None, distances)
    guided = Teacher(teacher, config, conditions.nothing)
    return MeanFlowLoss(config, guided) if config.distil == "meanflow" else ShortcutLoss(config, guided, distances)


def taught(config: TrainConfig) -> SamplingConfig:
    """How shortcut distillation follows its teacher, with the guidance that is distilled, up to `last_step`."""
    return SamplingConfig(PATH_STEPS, guidance=config.teacher_guidance, interval=config.teacher_interval)


def last_step(config: TrainConfig) -> int:
    """The number, from 0, of the teacher's step that leads straight to the image which is predicted at its start."""
    return min(round(config.teacher_last * PATH_STEPS), PATH_STEPS - 1)


def path_passes(config: TrainConfig) -> int:
    """The teacher's network passes for one path; a guided evaluation counts as two."""
    sampling = taught(config)
    return sum(1 + sampling.guides(step / PATH_STEPS) for step in range(last_step(config) + 1))


class Teacher:
    """A trained model with the guidance that is distilled; nothing of it has gradients.

    Args:
        model: the teacher.
        config: teacher_guidance, teacher_interval and teacher_last are its own.
        nothing: what stands for no condition, see Conditions.
    """

    def __init__(self, model: PatchDenoiser, config: TrainConfig, nothing: Tensor):
        self.model, self.nothing = model.eval().requires_grad_(False), nothing
        self.sampling, self.last = taught(config), last_step(config)

    def path(self, noise: Tensor, condition: Tensor, base_resolution: tuple[int, int] | None) -> Tensor:
        """The path from noise [G, C, H, W] to images, at even times from 0 to 1: [PATH_STEPS + 1, G, C, H, W].

        From its last step on it is straight, as its teacher's samples end where single pixels have not yet gone wrong.
        In float32: what bfloat16 rounds would stay on the path, and the student would learn it.
        """
        options = {"unconditional": self.nothing, "noise": noise, "base_resolution": base_resolution}
        points = [noise]
        with torch.autocast(noise.device.type, enabled=False):
            for state in trajectory(self.model, condition, self.sampling, **options):
                if state.step > self.last:
                    break
                points.append(state.x)
            shares = torch.linspace(0, 1, PATH_STEPS - self.last + 1)[1:].tolist()
            return torch.stack([*points, *(torch.lerp(points[-1], state.image, share) for share in shares)])

    @torch.no_grad()
    def velocity(self, x: Tensor, t: Tensor, condition: Tensor, base_resolution: tuple[int, int] | None) -> Tensor:
        """v_u + w·(v_c − v_u) where t lies inside the interval, else v_c; x [B, C, H, W], t [B] → [B, C, H, W].

        In float32, as the path.
        """
        w, interval = self.sampling.guidance, self.sampling.interval
        nothing = self.nothing.to(condition).expand_as(condition)
        with torch.autocast(x.device.type, enabled=False):
            given = self.model(x, t, condition, base_resolution)
            guided = given if w == 1 else torch.lerp(self.model(x, t, nothing, base_resolution), given, w)
        if interval is None:
            return guided
        return torch.where(along((interval[0] < t) & (t < interval[1]), x), guided, given)


class ShortcutLoss(Objective):
    """Two half steps are one step, on the teacher's own paths, from its steps up to the one step of the whole path.

    With a teacher that follows new paths in every step, consecutive images of a batch, as many as SHORTCUTS, are the
    intervals of one path, which starts at the noise of the first and is told what that is told. Without one, the batch
    has intervals of kept paths, see KeptPaths. The data's images are not used. An error of u counts times the
    interval's length, so that the errors of all steps from noise to image count alike, however many there are.

    With fd_weight, the images in which paths end, in 1, 2, 4 and 8 steps, also have FD-loss: the teacher says which
    image, the data how sharp.
    """

    def __init__(self, config: TrainConfig, teacher: Teacher | None, distances: FeatureDistances | None = None):
        self.teacher, self.base_resolution = teacher, base_resolution(config)
        self.asked = () if teacher is None else (teacher.model,)
        self.distances, self.weight = distances, config.fd_weight
        self.kept = distances.moments if distances else None

    def __call__(self, networks: Networks, part: Batch, tap: int | None) -> FlowLoss:
        group = len(SHORTCUTS)
        if self.teacher is None:
            x, target = part.noise, (part.image - part.noise) / along(part.r - part.t, part.noise)
        else:
            condition = part.condition[::group]  # [G, …]: one for each path
            x, target = self.intervals(part.noise[::group], condition)
            part = part._replace(condition=condition.repeat_interleave(group, 0))
        found = regression(networks.trained, x, target, part, self.base_resolution)
        if self.distances is None:
            return found
        images = found.clean.unflatten(0, (-1, group))[:, LAST].flatten(0, 1)
        return found._replace(mean=found.mean + self.weight * self.distances(images))

    def measure_data(self, dataset: ImageDataset) -> None:
        if self.distances is not None:
            self.distances.measure_data(dataset)

    def updated(self) -> None:
        if self.distances is not None:
            self.distances.move()

    def intervals(self, noise: Tensor, condition: Tensor) -> tuple[Tensor, Tensor]:
        """Where each interval starts, x_t, and its mean velocity, both [B, C, H, W], path by path.

        noise [G, C, H, W] and condition [G, …] of the paths.
        """
        path = self.teacher.path(noise, condition, self.base_resolution)  # [S + 1, G, C, H, W]
        steps = len(path) - 1
        means = {1 / steps: (path[1:] - path[:-1]) * steps}  # by length of the intervals; first the teacher's steps
        while (length := max(means)) < 1:
            means[2 * length] = twice_as_long(means[length])
        x = [path[round(t * steps)] for t, _ in SHORTCUTS]
        u = [means[r - t][round(t / (r - t))] for t, r in SHORTCUTS]
        return torch.stack(x, 1).flatten(0, 1), torch.stack(u, 1).flatten(0, 1)


class MeanFlowLoss(Objective):
    """u − (r − t)·du/dt is the teacher's velocity, where du/dt has no gradient."""

    def __init__(self, config: TrainConfig, teacher: Teacher):
        self.teacher, self.base_resolution, self.asked = teacher, base_resolution(config), (teacher.model,)

    def __call__(self, networks: Networks, part: Batch, tap: int | None) -> FlowLoss:
        x = flow.interpolate(part.image, part.noise, part.t)
        v = self.teacher.velocity(x, part.t, part.condition, self.base_resolution)

        def u(x: Tensor, t: Tensor, r: Tensor) -> Tensor:
            return networks.bare(x, t, part.condition, self.base_resolution, r=r)

        target = mean_velocity(u, v, x, part.t, part.r)
        return regression(networks.trained, x, target, part, self.base_resolution)


def regression(
    network: nn.Module, x: Tensor, target: Tensor, part: Batch, base_resolution: tuple[int, int] | None
) -> FlowLoss:
    """The mean squared error of u(x_t, t, r) against a target, both [B, C, H, W], times the interval's length.

    n steps from noise to image err by the sum of (r − t)·error, whose square is about (r − t) times that of one error:
    so weighted, a path counts the same in however many steps. For a model that predicts the image see flow.bounded.
    """
    u = network(x, part.t, part.condition, base_resolution, r=part.r)
    error = flow.bounded(u - target, part.t, network.config.prediction)
    per_image = flow.mean_square(error) * (part.r - part.t)  # [B]
    return FlowLoss(per_image.mean(), per_image.detach(), flow.clean_image(x, u, part.t))


class FrechetLoss(Objective):
    """The Fréchet distance between one-step images and the data, see FeatureDistances."""

    def __init__(self, config: TrainConfig, distances: FeatureDistances):
        self.base_resolution, self.distances, self.kept = base_resolution(config), distances, distances.moments

    def __call__(self, networks: Networks, part: Batch, tap: int | None) -> FlowLoss:
        u = networks.trained(part.noise, part.t, part.condition, self.base_resolution, r=part.r)
        images = flow.clean_image(part.noise, u, part.t)  # [B, C, H, W]
        total = self.distances(images)
        return FlowLoss(total, total.detach().expand(len(images)), images)

    def measure_data(self, dataset: ImageDataset) -> None:
        self.distances.measure_data(dataset)

    def updated(self) -> None:
        self.distances.move()
