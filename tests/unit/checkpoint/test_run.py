"""The checkpoints of a run: which are finished, and which one is meant."""

import os
import shutil

import jax.numpy as jnp
import pytest

from emaopt import checkpoint
from emaopt.checkpoint._run import finished_steps, is_finished


def restored(path, **arguments):
    like = {"w": jnp.zeros(3)}
    return float(checkpoint.restore_averages(path, like, **arguments)["w"][0])


@pytest.mark.parametrize("copy", ["backup_20240101", "best_7", "copy_of_3", "٩", "serving_10"])
def test_a_copy_beside_the_steps_is_no_step(copy, run):
    shutil.copytree(run / "1", run / copy)
    assert list(finished_steps(run)) == [1, 2, 3]
    assert restored(run) == 3.0
    assert restored(run / copy) == 1.0


def test_two_directories_of_one_step_are_an_error_that_names_both(run):
    shutil.copytree(run / "1", run / "003")
    with pytest.raises(ValueError, match=r"has step 3 twice: '003' and '3'"):
        restored(run)


def test_steps_may_have_one_prefix_and_a_fixed_length(run):
    for step in (1, 2, 3):
        (run / str(step)).rename(run / f"step_{step:08}")
    assert restored(run) == 3.0
    assert restored(run, step=2) == 2.0
    (run / "step_00000002").rename(run / "best_2")
    with pytest.raises(ValueError, match=r"several names: 'best_2', 'step_00000003'"):
        restored(run)


def test_a_newest_step_that_may_not_be_read_is_an_error(run, monkeypatch):
    stat = os.stat

    def forbidden(path, **arguments):
        if "/3/" in str(path):
            raise PermissionError
        return stat(path, **arguments)

    monkeypatch.setattr(os, "stat", forbidden)
    with pytest.raises(PermissionError, match=r"may not be read by this user: '.*/run/3'"):
        restored(run)


def test_a_path_inside_a_checkpoint_is_corrected(run):
    with pytest.raises(ValueError, match=r"is an item of a checkpoint. Pass '.*/run/3'"):
        restored(run / "3" / "params")


def test_many_steps_are_listed_in_part(tmp_path):
    for step in range(30):
        (tmp_path / str(step)).mkdir()
        (tmp_path / str(step) / "_CHECKPOINT_METADATA").touch()
    with pytest.raises(FileNotFoundError, match=r"step=99 is not in .* 19\] and 10 more"):
        restored(tmp_path, step=99)


def test_whether_it_is_finished_in_a_cloud_is_asked_there():
    class Cloud(str):
        def __truediv__(self, name):
            return Cloud(f"{self}/{name}")

        def exists(self):
            return self == "gs://run/3/_CHECKPOINT_METADATA"

    assert is_finished(Cloud("gs://run/3"))
    assert not is_finished(Cloud("gs://run/4"))


def test_a_cloud_that_cannot_be_reached_is_one_line(monkeypatch):
    def unreachable(_):
        raise RuntimeError("Could not resolve host")

    monkeypatch.setattr("emaopt.checkpoint._run.is_finished", unreachable)
    message = r"path='gs://bucket/run' cannot be looked at\. \(RuntimeError: Could not resolve"
    with pytest.raises(OSError, match=message):
        checkpoint.restore_averages("gs://bucket/run", {"w": jnp.zeros(2)})


def test_what_is_no_path_is_named():
    with pytest.raises(ValueError, match=r"path=None is no path\. Pass a str or a pathlib\.Path"):
        checkpoint.restore_params(None, {"w": jnp.zeros(2)})
