"""kill −9 and requests to stop at random moments, even while a checkpoint is written: no promised step is lost,
nothing half-written is read.

`python -m tests.measure.kills` does the same many times more, in all combinations of processes and loaders.
"""

import signal

import pytest

from pixnerd.runs import Run

from .killed_worker import EVERY, Server, final_tensors, hidden, kill_again_and_again, stop_again_and_again


@pytest.mark.parametrize(
    ("kills", "ranks", "workers"),
    [(20, 1, 0), (4, 1, 2), (4, 3, 0)],
    ids=["alone", "with loaders", "three ranks"],
)
def test_kills_lose_no_announced_step_and_change_nothing(tmp_path, kills, ranks, workers):
    killed, straight = tmp_path / "killed", tmp_path / "straight"
    settings = {"batch_size": 6, "keep_checkpoints": 2, "workers": workers}
    with Server() as server:
        seen_half, reached = kill_again_and_again(server, killed, kills, ranks, **settings)
        assert seen_half >= kills // 2  # otherwise half-written checkpoints were not tested
        steps = reached + EVERY
        for folder in (killed, straight):
            server.start(folder, ranks, steps=steps, checkpoint_every=EVERY, log_every=1, **settings)
            assert server.end() == [0] * ranks
    tensors = final_tensors(killed, steps)
    assert tensors
    assert tensors == final_tensors(straight, steps)  # bit for bit
    assert [entry["step"] for entry in Run(killed).read_log()] == list(range(1, steps + 1))
    assert not hidden(killed)


@pytest.mark.parametrize(("ranks", "workers"), [(1, 2), (2, 1)])
def test_a_request_to_stop_keeps_every_step_and_says_by_its_code_that_it_is_not_done(tmp_path, ranks, workers):
    settings = {"batch_size": 8, "workers": workers}
    with Server() as server:
        signals = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
        last = stop_again_and_again(server, tmp_path / "stopped", signals, ranks, **settings)[-1] + 2
        for name in ("stopped", "straight"):
            server.start(tmp_path / name, ranks, steps=last, **settings)
            assert server.end() == [0] * ranks
    assert final_tensors(tmp_path / "stopped", last) == final_tensors(tmp_path / "straight", last)
