"""Averages fed back into training: every n updates the parameters are their average."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import train
from compare import bitwise
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec as P
from orbax.checkpoint import v1 as ocp

import emaopt
from emaopt import checkpoint


PARAMS = {"w": jnp.asarray([[0.9, -3.0, 2.7], [0.5, 1.4, -0.8]]), "b": jnp.asarray([0.7, -1.1])}
GRADS = [
    jax.tree.map(lambda p, key=key: 0.3 * jax.random.normal(key, p.shape), PARAMS)
    for key in jax.random.split(jax.random.key(0), 12)
]


def cast(tree, dtype):
    return jax.tree.map(lambda x: x.astype(dtype), tree)


def run(tx, params=PARAMS, grads=GRADS, opt_state=None):
    return train.history(tx, params, grads, opt_state)


def chain(n, average, **options):
    return optax.chain(optax.sgd(0.1, 0.9), emaopt.overwrite(n, average, **options))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_after_every_nth_update_the_parameters_are_the_averages_bit_for_bit(dtype):
    start, grads = cast(PARAMS, dtype), [cast(g, dtype) for g in GRADS]
    for t, (params, opt_state) in enumerate(run(chain(3, emaopt.ema(0.5)), start, grads), 1):
        equal = jax.tree.map(np.array_equal, params, emaopt.average(params, opt_state))
        assert all(jax.tree.leaves(equal)) == (t % 3 == 0)
        assert {x.dtype.name for x in jax.tree.leaves(params)} == {dtype}


HALF, BRAIN, SINGLE = "float16", "bfloat16", "float32"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "updates"),
    [(SINGLE, SINGLE), (BRAIN, BRAIN), (HALF, HALF), (BRAIN, SINGLE), (SINGLE, BRAIN)],
)
@pytest.mark.parametrize("take", [train.step, train.step.__wrapped__], ids=["jit", "op_by_op"])
def test_an_average_is_met_to_one_rounding_of_its_difference_and_exactly_nearby(
    dtype, updates, take
):
    rng = np.random.default_rng(0)
    numbers = rng.choice([-1, 1], (2, 10000)) * rng.uniform(1, 2, (2, 10000))
    p, shadow = np.ldexp(numbers, rng.integers(-4, 4, (2, 10000)))
    p, shadow = jnp.asarray(p, dtype), jnp.asarray(shadow, SINGLE)
    tx = emaopt.overwrite(1, emaopt.ema(1.0))
    opt_state = tx.init(p)._replace(shadow=shadow)
    a = emaopt.average(p, opt_state)
    new, _ = take(tx, p, opt_state, jnp.zeros(p.shape, updates))
    assert new.dtype == dtype
    new, p, a = (np.asarray(x.astype(SINGLE), np.float64) for x in (new, p, a))
    ulp = np.exp2(np.frexp(a - p)[1] - 1) * float(jnp.finfo(updates).eps)
    assert np.all(np.abs(new - a) <= ulp)
    near = (p / a >= 0.5) & (p / a <= 2)
    assert 1000 < near.sum() < 9000
    if updates != BRAIN or dtype == BRAIN:
        np.testing.assert_array_equal(new[near], a[near])
    assert np.any(new != a) == (jnp.finfo(updates).eps >= jnp.finfo(dtype).eps)


@pytest.mark.slow
def test_the_average_and_the_optimizer_see_the_step_as_it_was():
    fed, plain = chain(4, emaopt.ema(0.9)), optax.chain(optax.sgd(0.1, 0.9), emaopt.ema(0.9))
    one, other = run(fed), run(plain)
    for a, b in zip(one[:3], other[:3], strict=True):
        bitwise(a, b)
    bitwise(one[3][1], other[3][1])
    bitwise(one[3][0], emaopt.average(*other[3]))
    assert not np.array_equal(one[3][0]["w"], other[3][0]["w"])


def test_keras_overwrites_at_the_same_steps_by_the_same_numbers():
    # Keras 3.15.1: SGD(0.1, momentum=0.9, use_ema=True, ema_momentum=0.8,
    # ema_overwrite_frequency=3); variable and average after each step
    keras = [
        [[0.95792645, -1.9459698], [0.95792645, -1.9459698]],
        [[0.8745954, -1.9389573], [0.9412602, -1.9445674]],
        [[0.9115165, -1.961983], [0.9115165, -1.961983]],
        [[0.87550807, -2.1107664], [0.90431476, -1.9917396]],
        [[0.8910467, -2.2163053], [0.90166116, -2.0366528]],
        [[0.9051293, -2.072377], [0.9051293, -2.072377]],
        [[0.89743996, -1.996058], [0.9035914, -2.0571132]],
    ]
    grads = [jnp.asarray([0.5 * np.sin(t), -np.cos(t)], jnp.float32) for t in range(1, 8)]
    history = run(chain(3, emaopt.ema(emaopt.after(1, 0.8))), jnp.asarray([1.0, -2.0]), grads)
    for (params, opt_state), wanted in zip(history, keras, strict=True):
        np.testing.assert_allclose((params, opt_state[-1].shadow), wanted, rtol=5e-7)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [0.5, 0.8, 1.0])
@pytest.mark.parametrize("k", [1, 5])
def test_lookahead_is_an_overwrite_of_an_average_of_every_kth_value(k, alpha):
    slow = emaopt.ema(emaopt.every(k, (1 - alpha) ** (1 / k)))
    reference = optax.lookahead(optax.sgd(0.1, 0.9), k, alpha)
    both = optax.LookaheadParams.init_synced(PARAMS)
    for (params, opt_state), (wanted, _) in zip(
        run(chain(k, slow)), run(reference, both), strict=True
    ):
        for got, expected in ((params, wanted.fast), (opt_state[-1].shadow, wanted.slow)):
            for leaf in PARAMS:
                np.testing.assert_allclose(got[leaf], expected[leaf], rtol=2e-6, atol=1e-7)


def test_leaves_without_an_average_keep_their_update():
    masked = optax.masked(emaopt.ema(0.5), emaopt.matching("w"))
    fed, plain = run(chain(2, masked)), run(optax.sgd(0.1, 0.9))
    for t in range(12):
        bitwise(fed[t][0]["b"], plain[t][0]["b"])
    bitwise(fed[1][0]["w"], fed[1][1][-1].inner_state.shadow["w"])


def test_leaves_that_are_not_trained_stay():
    params = {"w": jnp.ones(2), "absent": None, "still": jnp.ones(2), "int": jnp.int32(3)}
    params |= {"key": jax.random.key(0), "counter": jnp.int32(5)}
    updates = {"w": jnp.ones(2), "absent": None, "still": None, "counter": jnp.int32(2)}
    updates |= dict.fromkeys(("int", "key"), np.zeros((), jax.dtypes.float0))
    tx = emaopt.overwrite(1, emaopt.ema(0.5))
    opt_state = tx.init(params)
    got, _ = tx.update(updates, opt_state, params)
    np.testing.assert_array_equal(got.pop("w"), [0.5, 0.5])
    assert got.pop("counter") == 2
    assert all(got[name] is updates[name] for name in got)


NAN = jax.tree.map(lambda p: jnp.full(p.shape, jnp.nan), PARAMS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrap", "grads", "made"),
    [
        (
            lambda tx: optax.MultiSteps(tx, 3).gradient_transformation(),
            [g for g in GRADS[:5] for _ in range(3)],
            slice(2, None, 3),
        ),
        (
            lambda tx: optax.apply_if_finite(tx, 10),
            [GRADS[0], *(g for good in GRADS[1:5] for g in (NAN, good))],
            slice(0, None, 2),
        ),
    ],
    ids=["accumulated", "finite"],
)
def test_only_steps_that_were_made_count(wrap, grads, made):
    tx = chain(2, emaopt.ema(0.5))
    expected, history = run(tx, PARAMS, GRADS[:5]), run(wrap(tx), PARAMS, grads)
    for (params, opt_state), (wanted, wanted_state) in zip(history[made], expected, strict=True):
        (got,) = emaopt.averages(opt_state).values()
        want = wanted_state[-1]
        assert got.step == want.step
        for a, b in zip(
            jax.tree.leaves((params, got)), jax.tree.leaves((wanted, want)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-6)
    for i in set(range(len(grads))) - set(range(len(grads))[made]) - {0}:
        bitwise(history[i][0], history[i - 1][0])


def test_the_state_is_that_of_the_average():
    inner = optax.masked(emaopt.ema(0.9), {"w": True, "b": False})
    bitwise(emaopt.overwrite(5, inner).init(PARAMS), inner.init(PARAMS))


def test_of_several_averages_one_is_fed_back_by_name():
    both = optax.named_chain(("fast", emaopt.ema(0.5)), ("slow", emaopt.ema(0.9)))
    params, opt_state = run(chain(2, both, name="slow"))[1]
    averages = emaopt.averages(opt_state)
    assert list(averages) == ["1/fast", "1/slow"]
    bitwise(params, averages["1/slow"].shadow)


def test_averages_of_different_leaves_are_fed_back_together():
    labels = {"w": "long", "b": "short"}
    both = optax.partition({"long": emaopt.ema(0.9), "short": emaopt.ema(0.5)}, labels)
    params, opt_state = run(chain(2, both))[1]
    bitwise(params, emaopt.average(params, opt_state))


@pytest.mark.many(2)
@pytest.mark.parametrize(
    "average",
    [
        emaopt.heal(emaopt.ema(0.5)),
        emaopt.ema(0.5, accumulator_dtype=emaopt.compensated("bfloat16"), ledger=True),
        emaopt.ema(0.5, accumulator_dtype=emaopt.stochastic()),
        emaopt.ema(0.5, sequential_update=False),
    ],
    ids=["healed", "compensated", "stochastic", "before"],
)
def test_averages_of_every_kind_are_fed_back(average):
    for params, opt_state in run(chain(2, average))[1::2]:
        for got, want in zip(
            jax.tree.leaves(params), jax.tree.leaves(emaopt.average(params, opt_state)), strict=True
        ):
            np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.slow
def test_the_parameters_of_an_nnx_model_are_overwritten():
    model = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, chain(2, emaopt.ema(0.5)), wrt=nnx.Param)
    loss = lambda model: jnp.sum(model(jnp.ones((1, 2))) ** 2)
    for _ in range(2):
        optimizer.update(model, nnx.grad(loss)(model))
    params = nnx.state(model, nnx.Param)
    bitwise(params, emaopt.average(params, optimizer.opt_state))


@pytest.mark.slow
def test_it_can_be_donated_and_scanned():
    tx = chain(3, emaopt.ema(emaopt.warmup(0.9)))
    expected = run(tx)[-1]
    copy = functools.partial(jax.tree.map, jnp.copy)
    donated = jax.jit(train.step.__wrapped__, static_argnums=0, donate_argnums=(1, 2))
    params = copy(PARAMS)
    opt_state = tx.init(params)
    for grads in GRADS:
        old, (params, opt_state) = params, donated(tx, params, opt_state, grads)
        assert old["w"].is_deleted()
    bitwise((params, opt_state), expected)
    many = jax.tree.map(lambda *x: jnp.stack(x), *GRADS)
    scan = lambda carry, grads: (train.step.__wrapped__(tx, *carry, grads), None)
    carry, _ = jax.jit(lambda carry: jax.lax.scan(scan, carry, many))((PARAMS, tx.init(PARAMS)))
    for a, b in zip(jax.tree.leaves(carry), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("stop", "dtype"), [(4, "float32"), (6, "bfloat16")], ids=["between", "at_an_overwrite"]
)
def test_a_resumed_run_is_bitwise_the_uninterrupted_one(stop, dtype, tmp_path):
    tx = chain(3, emaopt.ema(emaopt.every(3, 0.9)))
    params, grads = cast(PARAMS, dtype), [cast(g, dtype) for g in GRADS]
    history = run(tx, params, grads)
    with ocp.training.Checkpointer(tmp_path) as checkpointer:
        checkpoint.save(checkpointer, stop, *history[stop - 1])
        resumed = checkpoint.resume(checkpointer, params, tx.init(params))[:2]
    bitwise(tuple(resumed), history[stop - 1])
    bitwise(run(tx, resumed[0], grads[stop:], resumed[1])[-1], history[-1])


@pytest.mark.slow
def test_feeding_back_is_local_to_every_device():
    sharding = NamedSharding(jax.make_mesh((8,), ("x",)), P("x"))
    params = jax.device_put(jnp.linspace(1.0, 2.0, 16), sharding)
    tx = chain(2, emaopt.ema(0.5))
    opt_state = tx.init(params)
    compiled = train.step.lower(tx, params, opt_state, params).compile()
    assert not any(word in compiled.as_text() for word in ("all-", "collective", "scatter"))
    expected = run(tx, jnp.linspace(1.0, 2.0, 16), [jnp.linspace(1.0, 2.0, 16)] * 2)[-1]
    got = run(tx, params, [params] * 2)[-1]
    assert got[0].sharding.is_equivalent_to(sharding, 1)
    bitwise(got, expected)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: emaopt.overwrite(0, emaopt.ema(0.9)), "n=0 is out of range"),
        (lambda: emaopt.overwrite(2.5, emaopt.ema(0.9)), "n=2.5 is out of range"),
        (lambda: emaopt.overwrite(2, emaopt.ema(0.9), strength=2.0), "strength=2.0 is out of"),
        (lambda: emaopt.overwrite(2, emaopt.ema(0.9), outer=0.7), "outer=0.7 is no"),
        (lambda: emaopt.overwrite(2, 0.9), "tx=0.9 is not a transformation"),
        (lambda: emaopt.overwrite(2, optax.sgd(0.1)).init(PARAMS), "tx holds no average"),
        (lambda: run(chain(2, emaopt.ema(0.9), name="fast")), "name='fast' is not an average"),
        (
            lambda: run(chain(2, optax.chain(emaopt.ema(0.9), emaopt.ema(0.8)))),
            "name is missing: leaf 'b' has several averages",
        ),
    ],
    ids=["zero", "half", "strength", "outer", "number", "no_average", "unknown", "several"],
)
def test_what_cannot_be_fed_back_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def by_hand(n, feed):
    """The parameters after each update of momentum SGD; `feed(theta, slow)` at n, 2n, ..."""
    theta = {k: np.asarray(x, np.float64) for k, x in PARAMS.items()}
    slow = {k: x.copy() for k, x in theta.items()}
    trace = {k: np.zeros_like(x) for k, x in theta.items()}
    history = []
    for t, grads in enumerate(GRADS, 1):
        for k, g in grads.items():
            trace[k] = 0.9 * trace[k] + np.asarray(g, np.float64)
            theta[k] = theta[k] - 0.1 * trace[k]
        if t % n == 0:
            theta, slow = feed(theta, slow)
        history.append(dict(theta))
    return history


def assert_followed(tx, wanted):
    for (params, _), theta in zip(run(optax.chain(optax.sgd(0.1, 0.9), tx)), wanted, strict=True):
        for k, x in params.items():
            np.testing.assert_allclose(x, theta[k], rtol=1e-6, atol=1e-6)


def test_lookahead_is_an_outer_step_of_plain_descent():
    def feed(theta, slow):
        slow = {k: slow[k] + 0.5 * (theta[k] - slow[k]) for k in slow}
        return dict(slow), slow

    wanted = by_hand(3, feed)
    assert_followed(emaopt.overwrite(3, emaopt.ema(1.0), outer=optax.sgd(0.5)), wanted)
    assert_followed(emaopt.overwrite(3, emaopt.ema(emaopt.every(3, 0.5 ** (1 / 3)))), wanted)


def test_diloco_is_an_outer_step_with_nesterov_momentum():
    moments = dict.fromkeys(PARAMS, 0.0)

    def feed(theta, slow):
        for k in slow:
            g = slow[k] - theta[k]
            moments[k] = 0.9 * moments[k] + g
            slow[k] = slow[k] - 0.7 * (g + 0.9 * moments[k])
        return dict(slow), slow

    outer = optax.sgd(0.7, 0.9, nesterov=True)
    wanted = by_hand(3, feed)
    assert_followed(emaopt.overwrite(3, emaopt.ema(1.0), outer=outer), wanted)


@pytest.mark.slow
def test_workers_on_an_axis_share_the_outer_step():
    outer = optax.chain(
        optax.stateless(lambda g, p: jax.lax.pmean(g, "worker")), optax.sgd(0.7, 0.9, nesterov=True)
    )
    tx = optax.chain(optax.sgd(0.1), emaopt.overwrite(2, emaopt.ema(1.0), outer=outer))
    several = jax.tree.map(lambda g: jnp.stack([g, -2 * g, 3 * g]), GRADS[0])

    def train(grads):
        params, opt_state = PARAMS, tx.init(PARAMS)
        for t in range(4):
            mine = jax.tree.map(lambda g, t=t: g * (t + 1), grads)
            updates, opt_state = tx.update(mine, opt_state, params)
            params = optax.apply_updates(params, updates)
        return params, emaopt.average(params, opt_state)

    params, averaged = jax.vmap(train, axis_name="worker")(several)
    alone, _ = jax.vmap(train, axis_name="worker")(
        jax.tree.map(lambda g: jnp.stack([g * 2 / 3] * 3), GRADS[0])
    )
    for k, x in params.items():
        np.testing.assert_array_equal(x[0], x[1])
        np.testing.assert_array_equal(x, averaged[k])
        np.testing.assert_allclose(x, alone[k], rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_a_strength_moves_the_parameters_part_of_the_way():
    history, plain = run(chain(3, emaopt.ema(0.5), strength=0.25)), run(chain(3, emaopt.ema(0.5)))
    theta, averaged = plain[2][0], emaopt.average(*plain[2])
    raw, _ = run(optax.chain(optax.sgd(0.1, 0.9), emaopt.ema(0.5)))[2]
    for k, x in history[2][0].items():
        np.testing.assert_allclose(x, raw[k] + 0.25 * (averaged[k] - raw[k]), rtol=1e-6)
    bitwise(history[2][1], plain[2][1])
    bitwise(theta, averaged)
    zero = run(chain(3, emaopt.ema(0.5), strength=lambda step: jnp.where(step < 3, 0.0, 1.0)))
    for k, x in zero[2][0].items():
        np.testing.assert_allclose(x, raw[k], rtol=1e-6)
    bitwise(zero[5][0], emaopt.average(*zero[5]))


@pytest.mark.slow
def test_an_outer_step_of_a_compensated_average_loses_nothing_to_rounding():
    def after(accumulator_dtype, params):
        point = emaopt.ema(1.0, accumulator_dtype=accumulator_dtype)
        tx = emaopt.overwrite(1, point, outer=optax.sgd(1e-4))
        opt_state = tx.init(params)
        for _ in range(50):
            updates, opt_state = tx.update(jnp.ones_like(params), opt_state, params)
            params = optax.apply_updates(params, updates)
        return emaopt.average(params.astype(jnp.float32), opt_state[0])

    start = jnp.ones(1, jnp.bfloat16)
    exact = 1 + 50e-4
    np.testing.assert_allclose(after(None, start), exact, rtol=1e-4)
    np.testing.assert_allclose(after(emaopt.compensated(jnp.bfloat16), start), exact, rtol=3e-4)


def test_an_outer_step_leaves_what_has_no_average():
    masked = optax.masked(emaopt.ema(1.0), {"w": True, "b": False})
    history = run(chain(2, masked, outer=optax.sgd(0.5)))
    plain = run(optax.sgd(0.1, 0.9))
    np.testing.assert_array_equal(history[-1][0]["b"], plain[-1][0]["b"])
    assert not np.array_equal(history[-1][0]["w"], plain[-1][0]["w"])
    np.testing.assert_array_equal(history[-1][0]["w"], emaopt.average(*history[-1])["w"])
