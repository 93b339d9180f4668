"""Few-step students against a case whose flow map is known, and as training runs like every other.

Data N(μ, s²), noise N(0, 1), each pixel for itself: x_t ~ N(μt, σ_t²) with σ_t² = t²s² + (1 − t)², and the flow maps
x_t to x_r = μr + σ_r/σ_t·(x_t − μt).
"""

import dataclasses
import shutil

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from pixnerd import InputError, PixNerd, load, sample
from pixnerd.checkpoints import save_model
from pixnerd.config import STUDENT_SAMPLING, SamplingConfig, TrainConfig
from pixnerd.distributed import ALONE
from pixnerd.metrics import statistics
from pixnerd.model_source import student_config
from pixnerd.runs import Run
from pixnerd.training import distillation, train
from pixnerd.training.batches import SHORTCUTS, Batch, draw_step
from pixnerd.training.distillation import (
    FeatureMoments,
    MeanFlowLoss,
    ShortcutLoss,
    Teacher,
    frechet_distance,
    mean_velocity,
    total_derivative,
    twice_as_long,
)
from pixnerd.training.losses import Networks

from ..conftest import TINY, randomised
from .test_training import MODEL, config_for, final_files

MEAN, DEVIATION = 0.7, 0.4
CPU = torch.device("cpu")


def spread(t):
    return (t**2 * DEVIATION**2 + (1 - t) ** 2).sqrt()


def exact_map(x, t, r):
    t, r = t.view(-1, 1, 1, 1), r.view(-1, 1, 1, 1)
    return MEAN * r + spread(r) / spread(t) * (x - MEAN * t)


def exact_mean(x, t, r):
    return (exact_map(x, t, r) - x) / (r - t).view(-1, 1, 1, 1)


def exact_velocity(x, t):
    t = t.view(-1, 1, 1, 1)
    return MEAN + (t * DEVIATION**2 - (1 - t)) / spread(t) ** 2 * (x - MEAN * t)


class Exact(nn.Module):
    """The network that knows the flow, with an error of its own in every mean velocity."""

    config, num_classes = TINY, 5

    def __init__(self, error=0.0):
        super().__init__()
        self.error = nn.Parameter(torch.tensor(error, dtype=torch.float64))
        self.patch_embed = nn.Linear(1, 1).double()  # says on which device, and how precisely, to sample

    def as_condition(self, labels):
        return labels

    def unconditional(self, labels):
        return labels

    def forward(self, x, t, condition, base_resolution=None, tap=None, r=None):
        return exact_velocity(x, t) if r is None else exact_mean(x, t, r) + self.error


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def batch_of(count, distil="shortcut"):
    """A batch whose x_t are those of the Gaussian's path."""
    draws = draw_step(
        config_for("unused", distil=distil, teacher="t", sampling=STUDENT_SAMPLING), 0, range(count), (3, 8, 8), CPU
    )
    image, noise = MEAN + DEVIATION * random(count, 3, 8, 8), random(count, 3, 8, 8, seed=1)
    t, r, zeros = draws.t.double(), draws.r.double(), torch.zeros(count, dtype=torch.long)
    return Batch(image, zeros, noise, t, zeros, zeros.bool(), r)


def student_of(teacher, **changes):
    return TrainConfig(distil="shortcut", teacher=str(teacher), sampling=STUDENT_SAMPLING, **changes)


# --- mean velocities -------------------------------------------------------------------------------------------------


def test_two_half_steps_of_the_exact_map_are_one_step():
    x, times = random(2, 3, 8, 8), torch.linspace(0, 1, 5, dtype=torch.float64)
    path = [exact_map(x, torch.zeros(2).double(), time.expand(2)) for time in times]
    quarters = torch.stack([exact_mean(at, t.expand(2), r.expand(2)) for at, t, r in zip(path, times, times[1:])])  # noqa: B905
    halves = twice_as_long(quarters)
    for number, half in enumerate(halves):
        t, r = (times[2 * end].expand(2) for end in (number, number + 1))
        torch.testing.assert_close(half, exact_mean(path[2 * number], t, r), rtol=1e-12, atol=1e-12)
    (whole,) = twice_as_long(halves)
    torch.testing.assert_close(x + whole, path[-1], rtol=1e-12, atol=1e-12)
    assert not torch.allclose(whole, exact_velocity(x, torch.zeros(2).double()), atol=0.1)


def test_the_equation_of_the_mean_velocity_holds_for_the_exact_map():
    batch = batch_of(16, "meanflow")
    x, t, r = batch.image, batch.t, batch.r
    v, h = exact_velocity(x, t), 1e-6
    ahead, behind = (exact_mean(x + s * h * v, t + s * h, r) for s in (1, -1))
    torch.testing.assert_close(
        total_derivative(exact_mean, v, x, t, r), (ahead - behind) / (2 * h), rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(mean_velocity(exact_mean, v, x, t, r), exact_mean(x, t, r), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("switch", [{}, {"prediction": "x"}, {"head": "linear", "skip": True}], ids=str)
def test_derivative_of_a_network_is_the_numerical_one(switch):
    model = randomised(PixNerd(dataclasses.replace(TINY, student=True, **switch), 5)).double().train()
    x, v = random(2, 3, 8, 8), random(2, 3, 8, 8, seed=1)
    t, r, labels = torch.tensor([0.2, 0.5]).double(), torch.tensor([0.3, 1.0]).double(), torch.tensor([1, 5])

    def u(x, t, r):
        return model(x, t, labels, r=r)

    h = 1e-6
    with torch.no_grad():
        expected = (u(x + h * v, t + h, r) - u(x - h * v, t - h, r)) / (2 * h)
    found = total_derivative(u, v, x, t, r)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert not found.requires_grad
    assert found.abs().min() > 0


# --- the losses ------------------------------------------------------------------------------------------------------


@pytest.fixture
def teacher():
    return Teacher(Exact(), student_of("t"), torch.tensor(0))


@pytest.mark.parametrize(("steps", "error"), [(16, 0.2), (256, 0.0125)])
def test_shortcut_loss_knows_the_map_as_well_as_its_teachers_steps(monkeypatch, steps, error):
    """Euler's error falls with the length of the steps; that each interval ends on the path is exact."""
    monkeypatch.setattr(distillation, "PATH_STEPS", steps)
    teacher = Teacher(Exact(), student_of("t"), torch.tensor(0))
    batch, group = batch_of(32), len(SHORTCUTS)
    noise = batch.noise[::group]
    x, u = ShortcutLoss(student_of("t"), teacher).intervals(noise, batch.condition[::group])
    of_each = noise.repeat_interleave(group, 0)
    assert (x - exact_map(of_each, torch.zeros(32, dtype=torch.float64), batch.t)).abs().max() < error
    assert (u - exact_mean(x, batch.t, batch.r)).abs().max() < 1.8 * error  # of a velocity, not of a way
    path = teacher.path(noise, batch.condition[::group], None)
    for number in range(32):
        end = x[number] + (batch.r - batch.t)[number] * u[number]
        torch.testing.assert_close(end, path[round(float(batch.r[number]) * steps), number // group])


def test_meanflow_loss_vanishes_at_the_exact_map_and_nowhere_near(teacher):
    loss, batch = MeanFlowLoss(student_of("t"), teacher), batch_of(16, "meanflow")
    assert loss(Networks(Exact(), Exact()), batch, None).mean < 1e-20
    length = float((batch.r - batch.t).mean())
    assert loss(Networks(Exact(0.1), Exact()), batch, None).mean.item() == pytest.approx(0.01 * length)


@pytest.mark.parametrize("kind", [ShortcutLoss, MeanFlowLoss])
def test_gradients_are_those_of_the_loss_with_its_target_fixed(kind, teacher):
    """Finite differences in float64 through a whole network; only the network in the role `trained` moves."""
    loss = kind(student_of("t"), teacher)
    config = dataclasses.replace(TINY, student=True, prediction="x", image_size=8)
    model, other = (randomised(PixNerd(config, 5), seed).double() for seed in (0, 1))
    batch = batch_of(16, "shortcut" if kind is ShortcutLoss else "meanflow")
    names = ["head.embed.weight", "time_embed.mlp.0.weight", "blocks.1.attn.qkv.weight", "patch_embed.bias"]
    weights = [dict(model.named_parameters())[name] for name in names]
    gradients = torch.autograd.grad(loss(Networks(model, other), batch, None).mean, weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction, h = random(*weight.shape, seed=2), 1e-6
        values = []
        for step in (h, -2 * h):
            with torch.no_grad():
                weight += step * direction
            values.append(loss(Networks(model, other), batch, None).mean.item())
        with torch.no_grad():
            weight += h * direction
        expected = (values[0] - values[1]) / (2 * h)
        assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", [ShortcutLoss, MeanFlowLoss])
def test_only_the_trained_network_gets_a_gradient(kind, teacher):
    model, other = Exact(0.3), Exact(0.2)
    batch = batch_of(16, "shortcut" if kind is ShortcutLoss else "meanflow")
    kind(student_of("t"), teacher)(Networks(model, other), batch, None).mean.backward()
    assert model.error.grad.abs() > 0
    assert other.error.grad is None
    assert not any(parameter.requires_grad for parameter in teacher.model.parameters())


def test_a_teacher_is_guided_inside_its_interval():
    model = randomised(PixNerd(TINY, 5)).double()
    x, t, labels = random(3, 3, 16, 16), torch.tensor([0.2, 0.5, 0.8], dtype=torch.float64), torch.tensor([1, 2, 5])
    config = student_of("t", teacher_guidance=3.0, teacher_interval=(0.2, 0.7))
    found = Teacher(model, config, torch.tensor(5)).velocity(x, t, labels, None)
    given, free = model(x, t, labels), model(x, t, torch.full((3,), 5))
    torch.testing.assert_close(found[[0, 2]], given[[0, 2]])
    torch.testing.assert_close(found[1], (free + 3 * (given - free))[1])
    everywhere = Teacher(model, dataclasses.replace(config, teacher_interval=None), torch.tensor(5))
    torch.testing.assert_close(everywhere.velocity(x, t, labels, None), free + 3 * (given - free))


def test_frechet_distance_is_that_of_the_metrics_and_its_gradient_right():
    a, b = random(40, 5), random(50, 5, seed=1) @ random(5, 5, seed=2)
    means, covariances = [f.mean(0) for f in (a, b)], [f.T.cov() for f in (a, b)]
    values, basis = torch.linalg.eigh(covariances[1])
    root = (basis * values.sqrt()) @ basis.T
    found = frechet_distance(means[0], covariances[0], means[1], root)
    assert found.item() == pytest.approx(
        statistics.frechet_distance(means[0], covariances[0], means[1], covariances[1]), rel=1e-3
    )

    def distance(features):
        return frechet_distance(features.mean(0), features.T.cov(), means[1], root)

    torch.autograd.gradcheck(distance, a.requires_grad_())
    few = random(3, 5).requires_grad_()  # fewer images than features: no eigenvalue makes it infinite
    distance(few).backward()
    assert few.grad.isfinite().all()


def test_fd_loss_is_least_for_the_right_gaussian():
    """Generator a·ε + b against data N(μ, s²): (b − μ)² + (|a| − s)² over s²."""
    noise = random(100_000, 1)
    noise = (noise - noise.mean()) / noise.std(correction=0)
    moments = FeatureMoments(1, CPU)
    real = statistics.Moments(1)
    real.add(MEAN + DEVIATION * noise)
    moments.set_real(real.mean, real.covariance)
    for scale, shift in ((DEVIATION, MEAN), (0.9, 0.1)):
        a, b = (torch.tensor(value, dtype=torch.float64, requires_grad=True) for value in (scale, shift))
        distance = moments.distance(a * noise + b, 0.0, ALONE)
        expected = ((shift - MEAN) ** 2 + (scale - DEVIATION) ** 2) / DEVIATION**2
        assert distance.item() == pytest.approx(expected, abs=1e-4)
        slopes = torch.autograd.grad(distance, (a, b))
        assert slopes[0].item() == pytest.approx(2 * (scale - DEVIATION) / DEVIATION**2, abs=1e-3)
        assert slopes[1].item() == pytest.approx(2 * (shift - MEAN) / DEVIATION**2, abs=1e-3)


def test_shortcut_loss_with_fd_measures_the_images_in_which_paths_end(teacher):
    """Those of the intervals up to t = 1, of one to eight steps; the moments move with an update."""

    class Seen:
        moments, moved = nn.ModuleList(), 0

        def __call__(self, images):
            self.images = images
            return images.mean()

        def move(self):
            self.moved += 1

    batch, seen = batch_of(32), Seen()
    loss = ShortcutLoss(student_of("t", fd_weight=10.0), teacher, seen)
    exact = Exact()
    found = loss(Networks(exact, exact), batch, None)
    noise = batch.noise[:: len(SHORTCUTS)]
    ends = exact_map(noise, torch.zeros(2, dtype=torch.float64), torch.ones(2, dtype=torch.float64))
    assert len(seen.images) == 2 * 5  # the whole path twice, and the last step of 2, 4 and 8
    assert (seen.images - ends.repeat_interleave(5, 0)).abs().max() < 0.2  # Euler's error in where a step begins
    plain = ShortcutLoss(student_of("t"), teacher)(Networks(exact, exact), batch, None)
    torch.testing.assert_close(found.mean, plain.mean + 10 * seen.images.mean())
    torch.testing.assert_close(found.per_image, plain.per_image)
    (gradient,) = torch.autograd.grad(found.mean - plain.mean, exact.error)
    lengths = torch.tensor([1 - t for t, r in SHORTCUTS if r == 1])
    assert gradient.item() == pytest.approx(10 * lengths.mean().item())
    loss.updated()
    assert seen.moved == 1


def test_moments_are_plain_means_first_and_moving_averages_then():
    moments, seen = FeatureMoments(2, CPU), []
    moments.real_root.copy_(torch.eye(2))
    for step in range(4):
        features = random(8, 2, seed=step)
        moments.distance(features, 0.5, ALONE)
        moments.distance(features, 0.5, ALONE)  # computed twice, as where DDP settles its buckets: counted once
        moments.move()
        seen.append(features.mean(0))
    first = (seen[0] + seen[1]) / 2
    torch.testing.assert_close(moments.mean, (first / 2 + seen[2] / 2) / 2 + seen[3] / 2)
    assert moments.steps == 4


# --- intervals -------------------------------------------------------------------------------------------------------


def test_intervals_of_each_method():
    def drawn(distil):
        config = config_for("unused", distil=distil, teacher="t", sampling=STUDENT_SAMPLING)
        steps = [draw_step(config, step, range(16), (1, 2, 2), CPU) for step in range(40)]
        return (torch.stack([getattr(draws, name) for draws in steps]) for name in ("t", "r"))

    t, r = drawn("shortcut")
    assert torch.stack((t, r), -1).equal(torch.tensor(SHORTCUTS).expand(40, 16, 2))
    for steps in (1, 2, 4, 8):
        assert {(k / steps, (k + 1) / steps) for k in range(steps)} <= set(SHORTCUTS)
    t, r = drawn("meanflow")
    assert ((t <= r) & (r <= 1)).all()
    assert ((r - t) / (1 - t)).mean().item() == pytest.approx(0.5, abs=0.05)
    t, r = drawn("fd")
    assert t.eq(0).all()
    assert r.eq(1).all()
    plain = draw_step(config_for("unused"), 0, range(16), (1, 2, 2), CPU)
    assert plain.r.equal(plain.t)


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A teacher's run."""
    folder = tmp_path_factory.mktemp("teacher") / "run"
    list(train(config_for(folder, sampling=SamplingConfig(5, guidance=2.0, interval=(0.1, 0.9)))))
    return folder


def student_for(trained, folder, distil="shortcut", **changes):
    given = {"steps": 12, "log_every": 4, "checkpoint_every": 5, "paths": 0}  # for kept paths see test_paths.py
    return student_config(str(trained), None, out=str(folder), distil=distil, **(given | changes))


def test_a_student_begins_as_its_teacher(trained):
    """At r = t in every weight's place; at another r the head alone hears of it."""
    model = load(trained)
    config = dataclasses.replace(model.config, student=True)
    student = PixNerd(config, 10).eval()
    student.load_state_dict(model.state_dict())
    x, t, labels = torch.randn(4, 3, 16, 16), torch.tensor([0.0, 0.3, 0.9, 1.0]), torch.arange(4)
    expected = model(x, t, labels)
    torch.testing.assert_close(student(x, t, labels, r=t), expected, rtol=0, atol=1e-6)
    assert student(x, t, labels).equal(expected)
    r = torch.ones(4)
    assert not torch.allclose(student(x, t, labels, r=r)[:3], expected[:3], atol=1e-3)
    _, tokens = student(x, t, labels, tap=1, r=r)
    assert tokens.equal(model(x, t, labels, tap=1)[1])


@pytest.mark.parametrize(
    ("distil", "fd_weight"), [("shortcut", 0.0), ("meanflow", 0.0), ("fd", 0.0), ("shortcut", 0.1)]
)
def test_a_student_is_trained_resumed_and_sampled(trained, tmp_path, distil, fd_weight):
    straight, resumed = (
        student_for(trained, tmp_path / name, distil, fd_weight=fd_weight) for name in ("straight", "resumed")
    )
    losses, expected = [], [float(r.loss) for r in train(straight, CPU)]
    for stop in (7, None):
        for record in train(resumed, CPU):
            losses.append(float(record.loss))
            if record.step == stop:
                break
    assert losses == expected
    assert final_files(tmp_path / "resumed") == final_files(tmp_path / "straight")
    if distil == "fd" or fd_weight:  # what it remembers moved with every update
        moments = load_file(tmp_path / "straight/checkpoints/step-12/moments.safetensors")
        assert moments["0.steps"] == 12
    config = Run(tmp_path / "straight").config()
    assert config.teacher == f"{trained}@12"
    assert config.teacher_content
    assert (config.teacher_guidance, config.teacher_interval) == (2.0, (0.1, 0.9))
    assert config.model == dataclasses.replace(MODEL, student=True)
    student = load(tmp_path / "straight")
    for steps in (1, 4):
        assert sample(student, [0, 1], steps=steps).isfinite().all()
    with pytest.raises(InputError, match="solver is 'euler'; this model is a few-step student, which only 'map'"):
        sample(student, [0], solver="euler")
    with pytest.raises(InputError, match="guidance is 2.0; it has to be 1 with solver map"):
        sample(student, [0], guidance=2.0)


@pytest.mark.parametrize("distil", ["shortcut", "meanflow", "fd"])
def test_distillation_learns(tmp_path, distil):
    """From a teacher with random weights, whose paths are not straight."""
    save_model(randomised(PixNerd(MODEL, 10)), tmp_path / "teacher.safetensors")
    config = student_for(
        tmp_path / "teacher.safetensors",
        tmp_path / "run",
        distil,
        data="synthetic",
        model=MODEL,
        learning_rate=1e-2,
        teacher_guidance=1.0,
    )
    losses = [float(record.loss) for record in train(dataclasses.replace(config, steps=60), CPU)]
    assert sum(losses[-10:]) < (0.9 if distil == "fd" else 0.7) * sum(losses[:10])  # fd: of all images so far


def test_what_is_no_teacher_is_refused(trained, tmp_path):
    list(train(student_for(trained, tmp_path / "student"), CPU))
    with pytest.raises(InputError, match="student is a few-step student; a student's teacher samples in many steps"):
        train(student_for(tmp_path / "student", tmp_path / "second"), CPU)
    wide = dataclasses.replace(MODEL, width=24)
    with pytest.raises(InputError, match=r"^teacher .* is another network: width 16 → 24$"):
        train(student_for(trained, tmp_path / "third", model=wide), CPU)
    with pytest.raises(InputError, match="teacher_content asks for 123"):
        train(student_for(trained, tmp_path / "third", teacher_content="123"), CPU)
    with pytest.raises(InputError, match="is another network: student True → False"):
        train(config_for(tmp_path / "third", start_from=str(tmp_path / "student")), CPU)
    assert not (tmp_path / "third").exists()
    with pytest.raises(InputError, match="batch_size is 12; distil=shortcut needs a multiple of 16"):
        train(student_for(trained, tmp_path / "third", batch_size=12), CPU)
    nothing = {"perceptual": "efficientnet"}, {"align": "efficientnet", "align_block": 1}, {"frequency_quality": 50}
    for changes in nothing:
        with pytest.raises(InputError, match="a student learns from its teacher alone: leave it out"):
            student_for(trained, tmp_path / "third", **changes)
    for changes, sentence in (
        ({"teacher": ""}, "teacher is empty; a student needs both"),
        ({"distil": ""}, "distil is empty; a student needs both"),
        ({"teacher_interval": (0.5, 0.2)}, r"teacher_interval is \(0.5, 0.2\)"),
        ({"distil": "fd", "fd_networks": ()}, "fd_networks is empty"),
        ({"distil": "fd", "accumulate": 2}, "accumulate is 2; distil=fd needs"),
        ({"fd_weight": 0.1, "accumulate": 2}, "accumulate is 2; fd_weight needs"),
        ({"distil": "fd", "decode_sizes": (32, 64)}, r"decode_sizes is \(32, 64\); distil=fd compares"),
        ({"fd_weight": 0.1, "distil": "meanflow"}, "fd_weight is 0.1; it adds to distil=shortcut, not to meanflow"),
        ({"distil": "meanflow", "shard": True}, "shard is on; distil=meanflow"),
        ({"sampling": SamplingConfig()}, "sampling.solver is 'euler'; a student is sampled with map"),
    ):
        with pytest.raises(InputError, match=sentence):
            dataclasses.replace(student_for(trained, tmp_path / "third"), **changes)


def test_a_student_goes_on_with_the_teacher_it_began_with(trained, tmp_path):
    """Whether the teacher has trained on since, or its weights were replaced."""
    shutil.copytree(trained, tmp_path / "teacher")
    config = student_for(tmp_path / "teacher", tmp_path / "run")
    records = train(config, CPU)
    next(records)
    records.close()
    list(train(config_for(tmp_path / "teacher", steps=14, sampling=config_for("x").sampling), CPU))
    assert [record.step for record in train(config, CPU)] == list(range(2, 13))
    assert Run(tmp_path / "run").config().teacher == f"{tmp_path / 'teacher'}@12"
    shutil.copy(
        tmp_path / "teacher/checkpoints/step-14/ema.safetensors",
        tmp_path / "teacher/checkpoints/step-12/ema.safetensors",
    )
    with pytest.raises(InputError, match='already holds another run .teacher_content "'):
        train(config, CPU)
