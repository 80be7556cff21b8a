"""Averages as `.safetensors`: metadata, names, shards with an index, and back."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compare import bitwise
from etils.epath import Path
from orbax.checkpoint import v1 as ocp
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from train import train

import emaopt
from emaopt import checkpoint
from emaopt._safetensors import read_header


TX = optax.chain(optax.sgd(0.1), emaopt.ema(0.5))
PARAMS = {
    "conv": {"kernel": jnp.linspace(-1, 1, 8, dtype=jnp.bfloat16).reshape(2, 4)},
    "bias": jnp.arange(4.0),
    "scale": jnp.ones(()),
}
with jax.numpy_dtype_promotion("standard"):
    PARAMS, STATE = train(TX, PARAMS, [PARAMS] * 3)
STATS = {"bn": {"mean": jnp.full(2, 5.0), "count": 3}}
AVERAGE = emaopt.average(PARAMS, STATE)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("run")
    with ocp.training.Checkpointer(directory) as checkpointer:
        checkpoint.save(checkpointer, 7, PARAMS, STATE, batch_stats=STATS, note="a text")
    return directory


def texts(path):
    with safe_open(path, "np") as file:
        return file.metadata()


def test_the_metadata_say_what_it_is(run, tmp_path):
    file = tmp_path / "a.safetensors"
    checkpoint.export_averages(run, file, custom_metadata={"format": "pt", "mine": [1]})
    about = texts(file)
    version = emaopt.__version__
    assert (about["step"], about["average"], about["emaopt_version"]) == (
        "7",
        "opt_state/1",
        version,
    )
    assert (about["format"], about["mine"]) == ("pt", "[1]")
    bitwise(checkpoint.restore_averages(file, PARAMS), AVERAGE)
    (run / "7").rename(run / "step_7")  # the stamp says it
    checkpoint.export_averages(run / "step_7", tmp_path / "b.safetensors")
    (run / "step_7").rename(run / "7")
    assert texts(tmp_path / "b.safetensors")["step"] == "7"


def test_the_step_is_in_the_name_where_no_stamp_says_it(tmp_path):
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpointer.save_checkpointables(12, {"params": PARAMS, "opt_state": STATE})
    for i, source in enumerate([tmp_path / "run" / "12", tmp_path / "run" / "served"]):
        checkpoint.export_averages(source, tmp_path / f"{i}.safetensors")
        assert texts(tmp_path / f"{i}.safetensors").get("step") == ("12", None)[i]
        source.rename(tmp_path / "run" / "served")


def test_batch_statistics_go_with_the_averages(run, tmp_path):
    file = tmp_path / "a.safetensors"
    checkpoint.export_averages(run, file, rest=["batch_stats"])
    assert set(load_file(file)) == {
        *("bias", "conv/kernel", "scale", "batch_stats/bn/mean", "batch_stats/bn/count")
    }
    mean = {"bn": {"mean": STATS["bn"]["mean"]}}
    want = AVERAGE | {"batch_stats": mean}
    bitwise(checkpoint.restore_averages(file, PARAMS | {"batch_stats": mean}), want)
    checkpoint.export_averages(run, tmp_path / "served", rest=["batch_stats", "note"])
    served = ocp.load(tmp_path / "served", checkpointable_name="rest")
    assert served["note"] == "a text"
    bitwise(served["batch_stats"]["bn"]["mean"], STATS["bn"]["mean"])
    bitwise(checkpoint.restore_averages(tmp_path / "served", PARAMS), AVERAGE)


@pytest.mark.parametrize("rename", [lambda own: f"model.{own.replace('/', '.')}", "dict"])
def test_names_of_hugging_face_lead_there_and_back(rename, run, tmp_path):
    theirs = {"conv/kernel": "model.conv.weight"} if rename == "dict" else rename
    checkpoint.export_averages(run, tmp_path / "a.safetensors", rename=theirs)
    names = set(load_file(tmp_path / "a.safetensors"))
    assert names == (
        {"model.conv.weight", "bias", "scale"}
        if rename == "dict"
        else {"model.conv.kernel", "model.bias", "model.scale"}
    )
    bitwise(checkpoint.restore_averages(tmp_path / "a.safetensors", PARAMS), AVERAGE)


def test_more_bytes_are_several_files_with_an_index(run, tmp_path):
    model = tmp_path / "model.safetensors"
    checkpoint.export_averages(run, model, max_shard_size=20, rename=lambda own: own.upper())
    files = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *files,
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 36
    assert index["metadata"]["step"] == "7"
    assert index["weight_map"] == {
        "BIAS": files[0],
        "CONV/KERNEL": files[1],
        "SCALE": files[1],
    }
    for file in files:
        assert set(load_file(tmp_path / file)) == {
            name for name, where in index["weight_map"].items() if where == file
        }
    for path in (model, tmp_path / "model.safetensors.index.json"):
        bitwise(checkpoint.restore_averages(path, PARAMS), AVERAGE)
    with pytest.raises(FileExistsError, match=r"index.json exists. Remove it or pass another"):
        checkpoint.export_averages(run, model)


def test_a_failure_in_a_later_file_leaves_nothing(run, tmp_path, monkeypatch):
    def failing(arrays, path, about):
        if "conv/kernel" in arrays:
            raise OSError(28, "No space left on device")
        save_file(arrays, path, about)

    monkeypatch.setattr("safetensors.numpy.save_file", failing)
    with pytest.raises(OSError, match=r"a.safetensors was not saved.*No space left on device"):
        checkpoint.export_averages(run, tmp_path / "a.safetensors", max_shard_size=20)
    assert not list(tmp_path.iterdir())


def test_a_sharded_array_is_read_in_parts(run, tmp_path):
    checkpoint.export_averages(run, tmp_path / "a.safetensors")
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("x"))
    like = {"bias": jax.ShapeDtypeStruct((4,), jnp.float32, sharding=sharding)}
    got = checkpoint.restore_averages(tmp_path / "a.safetensors", like)["bias"]
    assert got.sharding == sharding
    bitwise(got, AVERAGE["bias"])
    host = checkpoint.restore_averages(tmp_path / "a.safetensors", {"bias": np.zeros(4)})["bias"]
    assert isinstance(host, np.ndarray)
    assert host.dtype == np.float64


def flipped(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def cut(path):
    path.write_bytes(path.read_bytes()[:-4])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (flipped, r"a.safetensors: conv/kernel is damaged: its bits"),
        (cut, "conv/kernel is cut off"),
    ],
)
def test_damage_is_noticed(damage, message, run, tmp_path):
    checkpoint.export_averages(run, tmp_path / "a.safetensors")
    damage(tmp_path / "a.safetensors")
    with pytest.raises(checkpoint.DamagedError, match=message):
        checkpoint.restore_averages(tmp_path / "a.safetensors", PARAMS)


@pytest.mark.parametrize(
    ("like", "options", "error", "message"),
    [
        ({"bia": PARAMS["bias"]}, {}, checkpoint.MismatchError, r"bia is missing; close: bias"),
        ({"bias": jnp.ones(3)}, {}, checkpoint.MismatchError, r"bias has shape \(4,\), asked"),
        ({"bias": jnp.arange(4)}, {}, checkpoint.MismatchError, r"bias is float32\[4\], asked"),
        (PARAMS, {"name": "1"}, ValueError, r"holds one average. Leave step= and name= out"),
        (PARAMS, {"step": 7}, ValueError, r"holds one average. Leave step= and name= out"),
    ],
)
def test_what_is_not_there_is_named(like, options, error, message, run, tmp_path):
    checkpoint.export_averages(run, tmp_path / "a.safetensors")
    with pytest.raises(error, match=message):
        checkpoint.restore_averages(tmp_path / "a.safetensors", like, **options)


def test_a_file_or_an_index_that_is_none(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"is not there. Pass a file or its index"):
        checkpoint.restore_averages(tmp_path / "a.safetensors", PARAMS)
    (tmp_path / "a.safetensors.index.json").write_text("{}")
    with pytest.raises(checkpoint.DamagedError, match=r"index.json is damaged, or no index"):
        checkpoint.restore_averages(tmp_path / "a.safetensors", PARAMS)
    save_file({"bias": np.ones(4, np.float32)}, tmp_path / "b.safetensors", {"names": "{"})
    with pytest.raises(checkpoint.DamagedError, match=r"b.safetensors has damaged metadata"):
        checkpoint.restore_averages(tmp_path / "b.safetensors", PARAMS)


@pytest.mark.parametrize(
    ("destination", "options", "message"),
    [
        ("a.safetensors", {"max_shard_size": "5 apples"}, r"is no size. Pass bytes, or text like"),
        ("a.safetensors", {"max_shard_size": 0}, r"max_shard_size=0 is no size"),
        ("a.safetensors", {"rename": {"bia": "b"}}, r"no leaf. Did you mean 'bias'\?"),
        ("a.safetensors", {"rename": lambda own: "x"}, r"two leaves are named 'x'"),
        ("a.safetensors", {"rename": lambda own: None}, r"makes None of 'bias', which is no name"),
        ("a.safetensors", {"rest": ["note"]}, r"rest has text at note. Pass keys with arrays"),
        ("a", {"rename": {}}, r"rename is of .safetensors"),
        ("a", {"rest": ["stats"]}, r"has nothing of that name. .* has batch_stats, note"),
        ("a", {"rest": ["mean"]}, None),
    ],
)
def test_arguments_that_cannot_be_are_refused(destination, options, message, run, tmp_path):
    if message is None:
        checkpoint.export_averages(run, tmp_path / destination, **options)
        return
    with pytest.raises(ValueError, match=message):
        checkpoint.export_averages(run, tmp_path / destination, **options)
    assert not list(tmp_path.iterdir())


def test_two_things_of_one_name_are_refused(tmp_path):
    with ocp.training.Checkpointer(tmp_path / "run") as checkpointer:
        checkpoint.save(checkpointer, 1, PARAMS, STATE, a={"bn": 1}, b={"bn": 2})
    with pytest.raises(checkpoint.MismatchError, match=r"has several: rest/a/bn, rest/b/bn of"):
        checkpoint.export_averages(tmp_path / "run", tmp_path / "x", rest=["bn"])


@pytest.mark.parametrize(("text", "bytes_"), [("5GB", 5 * 10**9), ("2 MiB", 2**21), (7, 7)])
def test_sizes_are_written_as_hugging_face_does(text, bytes_):
    from emaopt.checkpoint._shards import as_bytes

    assert as_bytes(text) == bytes_


def test_a_part_of_a_tensor_is_read(tmp_path):
    values = {"a": jnp.arange(12.0).reshape(3, 4), "b": jnp.bfloat16(3)}
    save_file({k: np.asarray(x) for k, x in values.items()}, tmp_path / "x.safetensors")
    path = Path(tmp_path / "x.safetensors")
    found = read_header(path).tensors
    part = found["a"].part((slice(1, 3), slice(2, 4)))
    np.testing.assert_array_equal(part, [[6, 7], [10, 11]])
    assert found["b"].part(()) == 3
