"""Which passes are recorded as CUDA graphs and replayed. That the graphs are right is for tests.measure.gpu_checks."""

import contextlib
import dataclasses
import gc
import weakref
from unittest import mock

import pytest
import torch

from pixnerd import PixNerd, recorded, sample
from pixnerd.checkpoints import save_model
from pixnerd.cli import main
from pixnerd.cost import _cuda_autocast
from pixnerd.encodings import coordinate_table
from pixnerd.layers import rotary_table
from pixnerd.recorded import FIRST, MOST, RecordedForward

from .conftest import TINY, randomised


class Replayed:
    """A recording that computes: what it was made of, and how often it was replayed."""

    def __init__(self, function, inputs, pool):
        self.function, self.shapes, self.replays = function, [tuple(x.shape) for x in inputs], 0

    def replay(self, *inputs):
        assert [tuple(x.shape) for x in inputs] == self.shapes
        self.replays += 1
        return self.function(*inputs)


@pytest.fixture
def model(monkeypatch):
    monkeypatch.setattr(recorded, "record", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    model = randomised(PixNerd(TINY, 5)).eval()
    model.forward = RecordedForward(model)
    return model


def found(model):
    """Shapes of images → replays."""
    return {one.shapes[0]: one.replays for one in model.forward.recordings.values()}


def test_a_shape_is_recorded_when_it_is_met_for_the_third_time(model):
    """Guided passes have twice the images; the first of six steps is outside the interval."""
    plain = randomised(PixNerd(TINY, 5)).eval()
    options = {"steps": 6, "guidance": 2.0, "interval": (0.1, 1.0)}
    expected, images = (sample(network, [1, 2], **options) for network in (plain, model))
    torch.testing.assert_close(images, expected, rtol=0, atol=0)
    assert found(model) == {(4, TINY.channels, 16, 16): 5 - (FIRST - 1)}


def test_sizes_ends_precisions_and_inference_mode_have_recordings_of_their_own(monkeypatch):
    monkeypatch.setattr(recorded, "record", Replayed)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: (0, 1))
    student = randomised(PixNerd(dataclasses.replace(TINY, student=True), 5)).eval()
    plain = student.forward
    student.forward = RecordedForward(student)
    x, t, labels = torch.randn(1, TINY.channels, 16, 16), torch.tensor([0.2]), torch.tensor([3])
    large = torch.randn(1, TINY.channels, 32, 32)
    ways = [(x, None, None), (x, None, torch.tensor([0.7])), (large, None, None), (large, (16, 16), None)]
    with torch.no_grad():
        for image, base, r in ways:
            for _ in range(FIRST + 1):
                assert student(image, t, labels, base, r=r).equal(plain(image, t, labels, base, r=r))
    for mode in (torch.no_grad(), torch.inference_mode()):
        for dtype in (torch.float32, torch.bfloat16):
            with mode, _cuda_autocast(dtype):
                for _ in range(FIRST):
                    student(x, t, labels)
    assert [one.replays for one in student.forward.recordings.values()] == [5, 2, 2, 2, 1, 1, 1]


def test_gradients_taps_and_large_batches_are_computed(model):
    most = int(model.forward.most_values / (TINY.channels * 16**2))
    x, t, labels = torch.randn(3, TINY.channels, 16, 16), torch.rand(3), torch.arange(3)
    for _ in range(FIRST + 1):
        model(x, t, labels).sum().backward()
        with torch.no_grad():
            assert model(x, t, labels, tap=1)[1].ndim == 3
    assert not model.forward.met
    model.forward.most_values = x.numel() - 1
    with torch.no_grad():
        model(x, t, labels)
    assert not model.forward.met
    assert most > 1_000_000  # a network for a laptop is small for a GPU


def test_a_pass_is_recorded_after_one_that_warms_up_with_tables_of_its_own(monkeypatch, tiny):
    """What the recording reads lies in its own places; the tables it computes are no others, and others none of its."""
    tables, events = (rotary_table, coordinate_table), []
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: mock.Mock(replay=lambda: events.append("replay")))
    monkeypatch.setattr(torch.cuda, "Stream", mock.Mock)
    monkeypatch.setattr(torch.cuda, "current_stream", mock.Mock)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())

    @contextlib.contextmanager
    def graph(graph, pool, capture_error_mode):
        assert (pool, capture_error_mode) == ("a pool", "thread_local")
        assert [table.cache_info().currsize for table in tables] == [0, 0]
        events.append("begin")
        yield
        assert [table.cache_info().currsize for table in tables] == [1, 1]
        events.append("end")

    def compute(*inputs):
        events.append(("pass", [x.data_ptr() for x in inputs]))
        return tiny(*inputs)

    monkeypatch.setattr(torch.cuda, "graph", graph)
    inputs = torch.randn(2, TINY.channels, 16, 16), torch.rand(2), torch.arange(2)
    with torch.no_grad():
        made = recorded.record(compute, inputs, "a pool")
        again = [x.flip(0) for x in inputs]
        output = made.replay(*again)
    places = [x.data_ptr() for x in made.inputs]
    assert events == [("pass", places), "begin", ("pass", places), "end", "replay"]
    assert not {x.data_ptr() for x in inputs} & set(places)
    assert all(place.equal(x) for place, x in zip(made.inputs, again, strict=True))
    assert [table.cache_info().currsize for table in tables] == [0, 0]
    assert output.equal(made.output)  # of the recording, since this graph computes nothing
    assert output.data_ptr() != made.output.data_ptr()


def test_a_network_is_not_kept_by_its_recordings():
    other = PixNerd(TINY, 5)
    other.forward, reference = RecordedForward(other), weakref.ref(other)
    gc.disable()
    try:
        del other
        assert reference() is None
    finally:
        gc.enable()


def test_no_more_than_so_many_are_kept(model):
    with torch.no_grad():
        for images in range(1, MOST + 3):
            for _ in range(FIRST):
                model(torch.randn(images, TINY.channels, 16, 16), torch.rand(images), torch.zeros(images).long())
    assert len(model.forward.recordings) == MOST


def test_another_device_is_refused(tmp_path, capsys):
    save_model(randomised(PixNerd(TINY, 5)), tmp_path / "model.safetensors")
    with pytest.raises(SystemExit) as stop:
        main(["sample", str(tmp_path / "model.safetensors"), "--graphs", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    assert "the network is on cpu; they need an NVIDIA GPU" in capsys.readouterr().err
