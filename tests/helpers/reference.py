"""The averages as a paper defines them: slow, in float64, in the paper's letters."""

import numpy as np


def theta_bar(beta, theta):
    """All averages of the values theta_0, theta_1, ..., theta_T.

    theta_bar_0 = theta_0, theta_bar_t = beta(t) theta_bar_{t-1} + (1 - beta(t)) theta_t.
    """
    averages = [np.asarray(theta[0], np.float64)]
    for t, value in enumerate(theta[1:], start=1):
        averages.append(beta(t) * averages[-1] + (1 - beta(t)) * np.asarray(value, np.float64))
    return np.stack(averages)


def constant(d):
    return lambda t: d


def warmup(d):
    return lambda t: min(d, (1 + t) / (10 + t))


def debiased(d):
    return lambda t: d * (1 - d ** (t - 1)) / (1 - d**t)


def power(gamma, n=1):
    return lambda t: (1 - n / t) ** (gamma + 1)


def inverse_gamma(inv_gamma, power, maximum):
    return lambda t: min(1 - (1 + t / inv_gamma) ** -power, maximum)


def every(n, beta_over_n):
    return lambda t: beta_over_n(t) if t % n == 0 else 1.0


def after(start, beta):
    return lambda t: beta(t - start) if t > start else 0.0
