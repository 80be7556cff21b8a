"""What a user writes, type-checked in strict mode: every public name, with the types it gives."""

# optax and orbax have no py.typed
# pyright: reportMissingTypeStubs=false

from collections.abc import Iterator
from typing import Any, assert_type

import jax
import jax.numpy as jnp
import numpy as np
import optax
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint, merge, posthoc, presets, summary


Params = dict[str, jax.Array]


def loss(params: Params, x: jax.Array) -> jax.Array:
    return jnp.sum((params["w"] * x) ** 2)


def length(decay: emaopt.DecayLike, updates: int) -> float:
    return 1 / float(np.square(emaopt.profile(decay, updates)).sum())


def shrink(rate: emaopt.LearningRate) -> optax.GradientTransformationExtraArgs:
    return emaopt.momentum(rate, 0.9)


def decays() -> list[emaopt.Decay]:
    length: np.ndarray = emaopt.profile(lambda t: 1 - 1 / t, 10)
    rate = emaopt.Decay(lambda t: 1 / t, lambda t, n: n / t)
    return [
        rate,
        emaopt.warmup(0.999),
        emaopt.debiased(emaopt.half_life(float(length.sum()))),
        emaopt.power(7),
        emaopt.inverse_gamma(power=3 / 4),
        emaopt.every(10, emaopt.after(100, 0.99)),
        emaopt.warmup(jnp.float32(0.5)),
    ]


def optimizers() -> list[optax.GradientTransformationExtraArgs]:
    rate = emaopt.exponential_decay(0.1, decay_steps=100, decay_rate=0.96, staircase=True)
    return [
        emaopt.gradient_descent(rate),
        emaopt.momentum(0.1, 0.9, use_nesterov=True),
        emaopt.adagrad(jnp.float32(0.1)),
        emaopt.adadelta(),
        emaopt.adam(rate, beta1=0.5),
        emaopt.ftrl(0.1, l1_regularization_strength=0.01),
        emaopt.rmsprop(rate, momentum=0.9, centered=True),
    ]


def clipping() -> list[optax.GradientTransformation]:
    return [
        emaopt.clip_by_value(-1.0, {"w": 1.0, "b": None}),
        emaopt.clip_by_norm(1.0, axes=(0, 1)),
        emaopt.clip_by_average_norm(1.0),
        emaopt.clip_by_global_norm(1.0),
    ]


def train(params: Params, x: jax.Array) -> Params:
    tx = optax.named_chain(
        ("adam", emaopt.adam(0.1)),
        ("fast", emaopt.ema(0.9, accumulator_dtype=jnp.float32, ledger=True)),
        ("slow", emaopt.ema(emaopt.power(7), accumulator_dtype=emaopt.compensated())),
        ("small", emaopt.ema(lambda t: 0.5, accumulator_dtype=emaopt.stochastic(jnp.bfloat16))),
        ("well", optax.masked(emaopt.heal(emaopt.ema(0.9)), emaopt.matching("w"))),
        ("back", emaopt.overwrite(10, emaopt.ema(0.9), name="ema")),
        ("near", emaopt.primal(optax.sgd(0.1), emaopt.ema(0.9), 0.9)),
    )
    opt_state = tx.init(params)
    value, grads = emaopt.compute_gradients(loss, params, x, var_list=emaopt.matching("w"))
    assert_type(emaopt.global_norm(grads), jax.Array)
    params, opt_state = emaopt.apply_gradients(tx, grads, params, opt_state)
    with emaopt.uninterrupted():
        pass
    step = emaopt.minimize(loss, tx)
    params, opt_state, value = step(params, opt_state, x)
    print(float(value), int(emaopt.global_step(opt_state)))
    return params


def evaluate(params: Params, opt_state: optax.OptState) -> None:
    averaged = assert_type(emaopt.average(params, opt_state, "fast"), Params)
    loss(averaged, averaged["w"])
    swapped, state = emaopt.swap(params, opt_state, "fast")
    assert_type(swapped, Params)
    assert_type(emaopt.on_host(state), optax.OptState)
    assert_type(emaopt.reset(params, opt_state, "fast"), optax.OptState)
    found = assert_type(emaopt.averages(opt_state), dict[str, emaopt.EmaState])
    kept: emaopt.Ledger | None = found["fast"].ledger
    print(found["fast"].shadow, kept, found["fast"].step.dtype)
    known = assert_type(emaopt.ledgers(opt_state), dict[str, dict[str, jax.Array]])
    print(known["fast"]["mean_age"])
    assert_type(emaopt.stalled(params, opt_state, opt_state, "fast"), jax.Array)
    assert_type(emaopt.stacked(params, opt_state, ["fast", "slow"]), Params)
    kinds: list[emaopt.Rounding] = [emaopt.compensated(), emaopt.stochastic()]
    print(kinds)
    assert_type(emaopt.recalibrate(forward, params, [params["w"]]), Params)


def forward(statistics: Params, batch: jax.Array) -> Params:
    return {name: (x + batch) / 2 for name, x in statistics.items()}


def any_tree(values: Params) -> Params:
    mean = assert_type(emaopt.moving_average(0.5, ledger=True), emaopt.MovingAverage)
    state = assert_type(mean.init(values), emaopt.EmaState)
    state = assert_type(mean.update(values, state, num_updates=1), emaopt.EmaState)
    return emaopt.average(values, state)


def states(state: Any) -> None:
    match state:
        case emaopt.OptimizerState(step=step, slots=slots, powers=powers):
            print(int(step), slots["m"], powers["beta1_power"])
        case emaopt.SwappedEmaState(shadow=shadow):
            print(shadow)
        case emaopt.PrimalState(z=z):
            assert_type(z, Any)
        case emaopt.HealState(healed=healed):
            print(healed)
        case _:
            print(state)


def failures(path: str, params: Params) -> Params:
    try:
        return checkpoint.restore_averages(path, params)
    except checkpoint.DamagedError:
        return checkpoint.restore_averages(path, params, step=1)
    except checkpoint.MismatchError as error:
        raise SystemExit(str(error)) from error


def tables(params: Params, ids: jax.Array) -> Params:
    view = {"table": assert_type(emaopt.rows(ids, size=8), emaopt.Rows)}
    small = emaopt.take(params, view)
    return emaopt.put(params, small, view)


def names(params: Params, opt_state: optax.OptState) -> None:
    print(emaopt.names(opt_state), emaopt.slot(opt_state, "m"))
    assert_type(emaopt.slot_names(opt_state), list[str])
    assert_type(emaopt.average_name("w"), str)
    assert_type(emaopt.variables_to_restore(params, opt_state), dict[str, str])


def many_leaves(params: Params) -> optax.GradientTransformation:
    packed = emaopt.pack(params)
    opened: Params = emaopt.unpack(packed)
    print(opened["w"])
    return optax.chain(emaopt.on_leaves(emaopt.clip_by_norm(1.0)), emaopt.momentum(0.1, 0.9))


def checkpoints(params: Params, opt_state: optax.OptState) -> Iterator[Params]:
    checkpointer = ocp.training.Checkpointer("/run")
    saved = checkpoint.save(checkpointer, 1, params, opt_state, name="fast", epoch=7)
    assert_type(saved, bool)
    checkpoint.save_async(checkpointer, 2, params, opt_state, digest=False)
    assert_type(checkpoint.snapshot(checkpointer, 3, opt_state, jnp.bfloat16), bool)
    trees, metadata = checkpoint.items(params, opt_state, epoch=7)
    assert_type(metadata, dict[str, Any])
    params, opt_state, rest = checkpoint.from_items(trees, params, opt_state, epoch=0)
    params, opt_state, rest = checkpoint.resume(checkpointer, params, opt_state, epoch=0)
    params, opt_state, rest, skipped = checkpoint.resume_partial(checkpointer, params, opt_state)
    assert_type(skipped, dict[str, str])
    params = checkpoint.restore_params("/run", like=params)
    assert_type(rest, dict[str, Any])
    restored = checkpoint.restore_averages("/run", like=params, step=1, cast=True)
    yield assert_type(restored, Params)
    for step, averaged in checkpoint.watch("/run", like=params, timeout=0):
        assert_type(step, int)
        yield assert_type(averaged, Params)
    checkpoint.export_averages("/run", "/averages.safetensors", like=params)
    assert_type(checkpoint.sources("/run", like=params), dict[str, str])


def after_training(snapshots: list[Params]) -> Params:
    targets = [
        posthoc.window(10, at=20),
        posthoc.one_minus_sqrt(10, at=20),
        posthoc.anneal([0.75, 0.25], at=20),
    ]
    gammas = [posthoc.gamma(0.05), posthoc.gamma(0.10)]
    sources: list[posthoc.Source] = [*gammas, emaopt.half_life(5)]
    print(posthoc.residual([10, 20, 20], sources, at=20, target=targets[0]))
    error = posthoc.residual([10, 20], gammas, at=20, target=targets[0])
    assert_type(error, float)
    weights = posthoc.weights([10, 20], emaopt.half_life(5), at=20, target=emaopt.power(3))
    print(posthoc.sigma_rel(gammas[0]))
    run = merge.Run.open("/run", sources={"fast": 0.05})
    assert_type(run.plan(posthoc.gamma(0.15)), merge.Plan).write("/out")
    assert_type(run.snapshots[0], merge.Snapshot)
    merge.soup(["/run", "/other"], weights=[0.25, 0.75]).write("/soup")
    return assert_type(posthoc.synthesize(snapshots, weights), Params)


def of_others() -> list[emaopt.Decay]:
    return [
        presets.lightning(0.999),
        presets.composer("1000ba"),
        presets.nemo(0.999),
        presets.mmengine(momentum=0.001),
        presets.torchtitan(half_life_fraction=0.05),
        presets.bema(update_freq=1),
        presets.diffusers(use_ema_warmup=True),
        presets.edm2(0.05),
        presets.edm2_traditional(2, batch_size=1024),
        presets.ema_pytorch(),
        presets.ema_pytorch_karras(gamma=7),
        presets.keras(),
        presets.nnx(0.999),
        presets.optax(0.001),
        presets.tf1(0.999, num_updates=True),
        presets.tfa(),
        presets.tfa_swa(),
        presets.timm(),
        presets.torch(),
        presets.torch_swa(),
    ]


def logged(params: Params, opt_state: optax.OptState) -> None:
    with summary.writer("/logs", purge_step=7) as log:
        assert_type(log, summary.Writer)
        clip = emaopt.clip_by_global_norm(1.0)
        scalars = summary.scalars(params, opt_state, grads=params, clip=clip, decay=0.9, loss=1.0)
        log.write(assert_type(scalars, dict[str, jax.Array]))
        log.write([scalars], step=7)
        log.histograms(params, opt_state)
        log.text("run", "*begun*")
        log.graph(loss, params, params["w"])


def from_tf1(params: Params, opt_state: optax.OptState) -> tuple[Params, optax.OptState]:
    from emaopt import tf1

    slow: tf1.AverageName = "slow"
    rules: tf1.Rename = [*tf1.TF_LAYERS, *tf1.SLIM, tf1.depthwise("kernel$", "depthwise_kernel")]
    variables = assert_type(tf1.inspect("/model.ckpt"), list[tf1.Variable])
    print(variables[0].name, variables[0].becomes)
    params, opt_state, skipped = tf1.load_partial("/model.ckpt", params, opt_state)
    assert_type(skipped, dict[str, str])
    params, opt_state = tf1.load("/model.ckpt", params, opt_state, rename=rules)
    tf1.save("/model.ckpt-2", params, opt_state, average_name=slow, like="/model.ckpt")
    return params, opt_state
