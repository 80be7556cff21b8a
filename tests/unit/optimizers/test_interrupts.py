"""What a Ctrl-C does to a loop whose step is not one of `emaopt.minimize`."""

import functools
import random
import signal
import threading

import jax
import jax.numpy as jnp
import optax
import pytest

import emaopt


def ctrl_c(*_):
    signal.raise_signal(signal.SIGINT)


@pytest.fixture
def ring():
    """Make a Ctrl-C come after some seconds, wherever the program is then."""
    before = signal.signal(signal.SIGALRM, ctrl_c)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


def test_a_loop_with_a_donating_step_keeps_all(ring):
    tx = optax.chain(optax.sgd(0.1), emaopt.ema())

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state):
        return emaopt.apply_gradients(tx, params, params, opt_state)

    params = {f"w{i}": jnp.ones((32, 32)) for i in range(4)}
    opt_state = tx.init(params)
    params, opt_state = step(params, opt_state)
    for trial in range(20):
        ring(random.Random(trial).uniform(0.005, 0.02))
        try:
            while True:
                with emaopt.uninterrupted():
                    params, opt_state = step(params, opt_state)
        except KeyboardInterrupt:
            pass
        assert not any(leaf.is_deleted() for leaf in jax.tree.leaves((params, opt_state)))


def test_an_interrupt_waits_for_the_end_of_the_block_and_a_second_does_not():
    done = []

    def interrupted(times):
        with emaopt.uninterrupted():
            for _ in range(times):
                ctrl_c()
            done.append(times)

    for times in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            interrupted(times)
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_the_signals_of_a_cluster_wait_too_and_every_handler_is_called():
    done = []

    def stop(*_):
        done.append("stop")
        raise SystemExit(3)

    def step():
        with emaopt.uninterrupted():
            for number in numbers:
                signal.raise_signal(number)
            done.append("assigned")

    numbers = signal.SIGTERM, signal.SIGUSR1
    before = [signal.signal(number, stop) for number in numbers]
    try:
        with pytest.raises(SystemExit):
            step()
        assert done == ["assigned", "stop", "stop"]
        with pytest.raises(KeyboardInterrupt), emaopt.uninterrupted():
            ctrl_c()  # no SIGTERM comes, and its handler is not called
        assert [signal.getsignal(number) for number in numbers] == [stop, stop]
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
    assert len(done) == 3


def test_the_error_of_a_step_is_not_lost_behind_an_interrupt():
    def step():
        with emaopt.uninterrupted():
            ctrl_c()
            raise ValueError("of the step")

    with pytest.raises(KeyboardInterrupt) as raised:
        step()
    assert str(raised.value.__context__) == "of the step"


def test_elsewhere_it_does_nothing():
    done = []

    def work():
        with emaopt.uninterrupted():
            done.append(1)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with emaopt.uninterrupted():
        ctrl_c()
        done.append(2)
    signal.signal(signal.SIGINT, before)
    assert done == [1, 2]
