import dataclasses
import itertools

import pytest
import torch
from einops import rearrange
from safetensors.torch import load_file

from pixnerd import InputError, PixNerd, load_released, sample
from pixnerd.config import STUDENT_SAMPLING
from pixnerd.sampling import SamplingConfig, network_passes, sample_batches, sample_noise, trajectory
from pixnerd.solvers import SOLVERS, STUDENT_SOLVER

from .conftest import TINY, randomised

GOLDEN = "tests/golden/class_p4"
OF_VELOCITIES = [solver for solver in SOLVERS if solver != STUDENT_SOLVER]


class Recorder(PixNerd):
    """Records (t, batch size) of every call."""

    def forward(self, x, t, labels, base_resolution=None, r=None):
        self.calls.append((round(float(t[0]), 6), len(x)))
        return super().forward(x, t, labels, base_resolution, r=r)


@pytest.fixture
def recorder(tiny):
    tiny.__class__ = Recorder
    tiny.calls = []
    return tiny


def test_released_weights_give_the_released_sample():
    golden = load_file(f"{GOLDEN}.safetensors")
    model = load_released(f"{GOLDEN}.ckpt")
    x = sample(model, golden["labels"], noise=golden["noise"], steps=6, guidance=3.5, interval=(0.1, 1.0))
    expected = golden["euler_steps6_cfg3.5_interval0.1-1.0"]
    assert (expected - golden["noise"]).std() > 0.1
    assert (x - expected).abs().max() < 1e-4


def test_no_unconditional_half_outside_the_interval(recorder):
    sample(recorder, [0, 1], steps=10, guidance=2.0, interval=(0.2, 0.7))
    assert recorder.calls == [(i / 10, 4 if i in (3, 4, 5, 6) else 2) for i in range(10)]


@pytest.mark.parametrize(
    ("options", "sizes"),
    [
        ({"guidance": 1.0}, [2, 2, 2, 2]),
        ({"guidance": 2.0, "interval": None}, [4, 4, 4, 4]),
        ({"guidance": 2.0, "interval": (0, 1)}, [2, 4, 4, 4]),  # strictly inside, so not at t = 0
        ({"guidance": 0.0, "interval": None}, [4, 4, 4, 4]),
    ],
)
def test_where_guidance_costs(recorder, options, sizes):
    sample(recorder, [0, 1], steps=4, **options)
    assert [size for _, size in recorder.calls] == sizes


@pytest.mark.parametrize("solver", OF_VELOCITIES)
def test_passes_are_those_of_real_sampling(recorder, solver):
    config = SamplingConfig(7, solver, 2.0, (0.2, 0.7))
    sample(recorder, [0, 1], **dataclasses.asdict(config))
    assert network_passes(config) == sum(size for _, size in recorder.calls) / 2


def test_guidance_is_the_formula_and_the_interval_uses_shifted_times(tiny):
    noise = sample_noise((3, 16, 16), [0, 1])
    labels, no_label = torch.tensor([1, 4]), torch.tensor([5, 5])
    x, times = noise, [0, 0.25 / 2.5, 0.5 / 2, 0.75 / 1.5, 1]  # i/4 with shift 3
    with torch.no_grad():
        for t, t_next in itertools.pairwise(times):
            conditional, unconditional = (tiny(x, torch.full((2,), t), y) for y in (labels, no_label))
            w = 2.5 if 0.1 < t < 0.4 else 1
            x = x + (t_next - t) * (unconditional + w * (conditional - unconditional))
    got = sample(tiny, labels, noise=noise, steps=4, guidance=2.5, interval=(0.1, 0.4), shift=3.0)
    torch.testing.assert_close(got, x, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("solver", ["euler", "sde"])
def test_an_image_does_not_depend_on_its_batch(tiny, solver):
    labels = [0, 1, 2, 3, 4, 0, 1, 2]
    together = sample(tiny, labels, steps=3, seed=5, solver=solver)
    alone = sample(tiny, labels[7:], steps=3, indices=[7], seed=5, solver=solver)
    torch.testing.assert_close(together[7:], alone, atol=1e-4, rtol=1e-4)
    other = sample(tiny, labels, steps=3, seed=6, solver=solver)
    assert not torch.allclose(together, other, atol=0.1)


def test_noise_is_standard_normal_and_differs():
    noise = sample_noise((3, 32, 32), range(20))
    assert noise.mean().abs() < 0.02
    assert noise.std() == pytest.approx(1, abs=0.02)
    correlation = torch.corrcoef(noise.flatten(1)) - torch.eye(20)
    assert correlation.abs().max() < 0.1


def test_every_step_of_the_stochastic_solver_adds_noise_of_its_own(tiny):
    """With a velocity of 0, x ← x − ½·x·dt + √((1 − t)·dt)·noise: what each step added can be read off."""
    tiny.forward = lambda x, *_: torch.zeros_like(x)
    start = sample_noise((3, 16, 16), [4, 9], seed=7)
    states = list(trajectory(tiny, [0, 1], indices=[4, 9], seed=7, solver="sde", steps=6, guidance=1.0))
    added, dt = [], 1 / 6
    for step, (before, after) in enumerate(itertools.pairwise([start, *(state.x for state in states[:-1])]), start=1):
        t = (step - 1) * dt
        added.append((after - before + before * dt / 2) / ((1 - t) * dt) ** 0.5)
        torch.testing.assert_close(added[-1], sample_noise((3, 16, 16), [4, 9], seed=7, step=step), atol=1e-4, rtol=0)
    assert states[-1].x.equal(states[-2].x)
    rows = torch.stack((start, *added)).flatten(0, 1).flatten(1)  # the start and five steps of two images
    assert (torch.corrcoef(rows) - torch.eye(12)).abs().max() < 0.2  # more than five standard deviations


def test_trajectory_ends_where_sample_ends(tiny):
    states = list(trajectory(tiny, [0, 1], steps=5, guidance=2.0))
    assert [state.step for state in states] == [1, 2, 3, 4, 5]
    assert [state.t for state in states] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert states[-1].x.equal(sample(tiny, [0, 1], steps=5, guidance=2.0))
    # the last Euler step ends at the estimated image
    torch.testing.assert_close(states[-1].x, states[-1].image)
    assert not torch.allclose(states[1].x, states[1].image)


def test_many_images_are_sampled_in_batches(tiny):
    config, options = SamplingConfig(2, "sde", 2.0, None), {"size": (8, 24), "base_resolution": (4, 12), "seed": 3}
    batches = list(sample_batches(tiny, torch.tensor([0, 1, 2, 3, 4]), config, batch_size=2, **options))
    assert [len(batch) for batch in batches] == [2, 2, 1]
    together = sample(tiny, [0, 1, 2, 3, 4], config, **options)
    torch.testing.assert_close(torch.cat(batches), together, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, sample(tiny, [0, 1, 2, 3, 4], **options), atol=0.1)
    assert [len(batch) for batch in sample_batches(tiny, torch.zeros(65).long(), SamplingConfig(1))] == [64, 1]
    for labels, changes, sentence in (
        ([6], {}, "label 6 is outside"),
        ([0], {"size": (16, 18)}, "16x18 does not fit"),
        ([0], {"base_resolution": (16, 12)}, "cannot be shared|does not fit"),
        ([0], {"batch_size": 0}, "batch_size is 0; it has to be at least 1"),
    ):
        with pytest.raises(InputError, match=sentence):
            sample_batches(tiny, torch.tensor(labels), config, **changes)  # before the first batch
    assert len(list(sample_batches(tiny, torch.tensor([0, 1]), config, batch_size=1))) == 2


def test_sampling_builds_no_graph_and_takes_other_sizes(tiny):
    x = sample(tiny, [0], steps=2, size=(8, 24))
    assert x.shape == (1, 3, 8, 24)
    assert not x.requires_grad


@pytest.mark.parametrize(
    ("labels", "options", "sentence"),
    [
        ([0], {"steps": 0}, "steps is 0"),
        ([0], {"interval": (0.8, 0.2)}, r"interval is \(0.8, 0.2\)"),
        ([0], {"interval": (-0.1, 0.2)}, r"0 ≤ low < high ≤ 1"),
        ([0], {"solver": "dopri5"}, "solver 'dopri5' is unknown; known solvers: euler, heun"),
        ([6], {}, "label 6 is outside 0 … 5"),
        ([-1], {}, "label -1"),
        ([], {}, "at least one class"),
        ([0], {"size": (16, 18)}, "16x18 does not fit"),
        ([0, 1], {"noise": torch.zeros(1, 3, 16, 16)}, "1 images of noise, 2 conditions"),
        ([0], {"noise": torch.zeros(1, 3, 16, 16), "size": (8, 16)}, r"noise of \(16, 16\) pixels disagree"),
        ([0], {"noise": torch.zeros(1, 3, 16, 16), "size": (16, 8)}, "disagree"),
        ([0], {"indices": [0, 1]}, "2 images of noise, 1 conditions, 2 indices"),
        (["30 degrees"], {}, r"labels are \['30 degrees'\]; a list of classes, whole numbers, is needed"),
        ([0.7], {}, "labels have type torch.float32; whole numbers are needed"),
        ([0], {"noise": torch.zeros(1, 1, 16, 16)}, r"noise has shape \(1, 1, 16, 16\); \[B, 3, H, W\] is needed"),
        ([0], {"noise": torch.zeros(3, 16, 16)}, r"noise has shape \(3, 16, 16\); \[B, 3, H, W\] is needed"),
        ([0], {"size": 32}, "size is 32; a height and a width in pixels are needed"),
        ([0], {"base_resolution": (16,)}, r"base_resolution is \(16,\); a height and a width"),
    ],
)
def test_bad_input_is_refused_at_the_call(tiny, labels, options, sentence):
    with pytest.raises(InputError, match=sentence):
        trajectory(tiny, labels, **options)  # not iterated: it has to fail before any computation


@pytest.mark.parametrize("solver", OF_VELOCITIES)
@pytest.mark.parametrize("steps", [10, 25, 100])
def test_a_network_that_knows_the_image_ends_at_it(solver, steps):
    """Nothing of the noise stays, however small the last step is: 1 − t is clamped in the loss alone."""
    image = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    model = PixNerd(dataclasses.replace(TINY, prediction="x"), 5).eval()
    model.head.forward = lambda pixels, *_: rearrange(image, "b c (h p) (w q) -> (b h w) (p q) c", p=4, q=4)
    states = list(trajectory(model, [0, 1], solver=solver, steps=steps, guidance=1.0, seed=3))
    torch.testing.assert_close(states[-1].image, image, rtol=0, atol=1e-5)
    # one-step methods end exactly; a method that averages velocities is off by what they differ in rounding
    torch.testing.assert_close(states[-1].x, image, rtol=0, atol=1e-4)


@pytest.fixture
def student():
    return randomised(PixNerd(dataclasses.replace(TINY, student=True), 5)).eval()


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_a_student_takes_one_evaluation_a_step(student, steps):
    noise, labels = sample_noise((3, 16, 16), [0, 1]), torch.tensor([1, 4])
    x = noise
    with torch.no_grad():
        for t, t_next in itertools.pairwise(torch.linspace(0, 1, steps + 1)):
            x = x + (t_next - t) * student(x, t.expand(2), labels, r=t_next.expand(2))
    torch.testing.assert_close(sample(student, labels, noise=noise, steps=steps), x, atol=1e-4, rtol=1e-4)
    student.__class__, student.calls = Recorder, []
    states = list(trajectory(student, labels, noise=noise, steps=steps))
    assert [size for _, size in student.calls] == [2] * steps
    assert network_passes(dataclasses.replace(STUDENT_SAMPLING, steps=steps)) == steps
    torch.testing.assert_close(states[-1].image, states[-1].x)


def test_students_and_velocity_networks_have_solvers_of_their_own(tiny, student):
    assert len(list(trajectory(student, [0]))) == STUDENT_SAMPLING.steps  # its own default
    for solver in OF_VELOCITIES:
        with pytest.raises(InputError, match=f"solver is '{solver}'; this model is a few-step student"):
            trajectory(student, [0], solver=solver)
    with pytest.raises(InputError, match="solver 'map' follows a few-step student and this model is none"):
        trajectory(tiny, [0], solver="map", guidance=1.0)
    with pytest.raises(InputError, match="guidance is 2.0; it has to be 1 with solver map"):
        trajectory(student, [0], guidance=2.0)


def test_a_weaker_model_guides(tiny):
    """Autoguidance: the same condition for both models, outside the interval the model alone."""
    weak = randomised(PixNerd(dataclasses.replace(TINY, blocks=1), 5), seed=3).eval()
    labels = torch.tensor([1, 5])
    config = SamplingConfig(4, guidance=2.5, interval=(0.1, 0.6))
    for size, base in (((16, 16), None), ((8, 24), (4, 12))):
        x = sample_noise((3, *size), [0, 1])
        with torch.no_grad():
            for step in range(4):
                t = torch.full((2,), step / 4)
                good, bad = (network(x, t, labels, base) for network in (tiny, weak))
                x = x + (bad + 2.5 * (good - bad) if 0.1 < step / 4 < 0.6 else good) / 4
        options = {"weaker": weak, "size": size, "base_resolution": base}
        torch.testing.assert_close(sample(tiny, labels, config, **options), x, atol=1e-4, rtol=1e-4)
        (batch,) = sample_batches(tiny, labels, config, **options)
        torch.testing.assert_close(batch, x, atol=1e-4, rtol=1e-4)
    with pytest.raises(InputError, match="guide is runs/early, whose model has to be given as well"):
        trajectory(tiny, [0], config=dataclasses.replace(config, guide="runs/early"))
    with pytest.raises(InputError, match="guide is runs/early, but guidance 1 guides nothing"):
        SamplingConfig(guidance=1.0, guide="runs/early")
    for other in (PixNerd(TINY, 6), PixNerd(dataclasses.replace(TINY, channels=1), 5)):
        with pytest.raises(
            InputError, match=r"the guide is a model of \d classes with \d channels; a model of 5 classes"
        ):
            trajectory(tiny, [0], config, weaker=other)
    with pytest.raises(InputError, match="channels and a student; a model of 5 classes"):
        sample_batches(tiny, labels, config, weaker=PixNerd(dataclasses.replace(TINY, student=True), 5))
