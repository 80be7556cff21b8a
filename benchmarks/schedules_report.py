"""Write `results/schedules.md` from the numbers in `results/schedules.json`.

    python benchmarks/schedules_report.py

The six questions are those of `results/schedules_plan.md`; each is answered by its own criterion.
"""

import json

import numpy as np
from helpers import RESULTS
from timing import table


DEFAULT = "width 0.1"
CANDIDATES = ("none", "0.99", "0.999", "width 0.05", "width 0.1", "width 0.2")
REGIMES = {
    "one pass": ("fashion", "rows"),
    "many epochs": ("digits", "epochs"),
    "fine-tuning": ("fine-tuning",),
}
RULES = ("last tenth", "last fifth")
PLANNED = ("rows-muon", "epochs-adam")  # beside those that are there
DECAYS = ("linear", "cosine", "wsd", "warm")
SHOWN = {
    "linear": "linear",
    "cosine": "cosine",
    "warm": "linear after a warm-up of 5 %",
    "wsd": "WSD",
    "linear, bare": "linear, Adam without momentum",
    "primal power(0)": "`primal`, `power(0)`",
    "primal ema()": "`primal`, `ema()`",
    "primal 0.99": "`primal`, 0.99",
    "primal power(0), with momentum": "`primal`, `power(0)`, momentum kept",
    "primal ema(), with momentum": "`primal`, `ema()`, momentum kept",
    DEFAULT: "constant, `ema()` (EDM2's 0.10)",
    "width 0.05": "constant, EDM2's 0.05",
    "half-life 5 %": "constant, torchtitan",
    "warmup(0.9999)": "constant, `warmup(0.9999)`",
    "0.999": "constant, 0.999",
    "power(0)": "constant, plain mean",
    "none": "constant, no average",
}


def regime_of(setting):
    name = setting.rpartition("-")[0]
    return next(regime for regime, names in REGIMES.items() if name in names)


def test(found, method):
    """The test losses of a method, [lengths, seeds]."""
    return np.array(found["methods"][method]["test"], float)


def error(x):
    """The standard error of the mean, over the last axis."""
    return np.std(x, axis=-1, ddof=1) / np.shape(x)[-1] ** 0.5


def paired(found, method, other="linear"):
    """Mean differences to another method and their standard errors, [lengths] each."""
    difference = test(found, method) - test(found, other)
    return difference.mean(-1), error(difference)


def best_decay(found):
    """The least test loss of the tuned decays, in the mean over seeds, at each length."""
    known = [test(found, m).mean(-1) for m in DECAYS if m in found["methods"]]
    return np.min(known, axis=0)


def share(x, digits=1):
    return f"{100 * x:.{digits}f} %"


def above(x):
    return f"{share(abs(x))} {'above' if x > 0 else 'below'}"


def yes(holds):
    return "yes" if holds else "no"


def answer(holds):
    return "**Yes.**" if holds else "**No.**"


def without_schedule(results):
    """Question 1."""
    wins = pairs = worse = cases = strict = 0
    lines, of_decay = [], []
    for name, found in results.items():
        ours, linear = test(found, "primal power(0)"), test(found, "linear")
        mean, se = paired(found, "primal power(0)")
        wins, pairs = wins + (ours < linear).sum(), pairs + ours.size
        worse, cases = worse + (mean > 2 * se).sum(), cases + len(mean)
        strict += (ours.mean(-1) < best_decay(found)).sum()
        of_decay.append(ours.mean(-1) / best_decay(found) - 1)
        cells = [f"{m:+.4f} ± {s:.4f}" for m, s in zip(mean, se, strict=True)]
        lines.append([name, *cells, f"{(ours < linear).sum()} of {ours.size}"])
    holds = wins >= 0.9 * pairs and worse <= 0.1 * cases
    text = [
        f"{answer(holds)} One run of `primal` with `power(0)` at one rate is better than linear "
        f"decay tuned for each length in {wins} of {pairs} pairs, and worse by two standard "
        f"errors in {worse} of {cases} cases. Beside the best of linear, cosine, WSD and linear "
        "after a warm-up, each tuned for each length (the best by the test loss; stricter than "
        f"planned), its mean is lower in {strict} of {cases} cases, and "
        f"{above(np.mean(of_decay))} that best in the mean.",
        "",
        "`primal` minus linear, test loss, an eighth, a quarter, half and all of the steps:",
        "",
        *table(["setting", "1/8", "1/4", "1/2", "1", "better pairs"], lines),
    ]
    numbers = {"wins": int(wins), "pairs": int(pairs), "worse": int(worse), "cases": int(cases)}
    return text, numbers


def average_alone(results):
    """Question 2."""
    names = ("width 0.1", "warmup(0.9999)", "half-life 5 %", "0.999", "none")
    to_linear = {m: [] for m in names}
    to_best = {m: [] for m in names}
    for found in results.values():
        for method in names:
            own = test(found, method).mean(-1)
            to_linear[method].append(own / test(found, "linear").mean(-1) - 1)
            to_best[method].append(own / best_decay(found) - 1)
    means = {m: np.mean(x) for m, x in to_linear.items()}
    rows = [
        [SHOWN[m], share(means[m]), share(np.max(to_linear[m])), share(np.mean(to_best[m]))]
        for m in names
    ]
    text = [
        f"{answer(means[DEFAULT] <= 0.02)} The loss of `ema()`, of one run at one constant rate, "
        f"is {above(means[DEFAULT])} that of linear decay tuned for each length, in the mean over "
        f"settings and lengths; and {above(np.mean(to_best[DEFAULT]))} that of the best of the "
        "four decays at each.",
        "",
        *table(["", "to linear, mean", "worst", "to the best decay, mean"], rows),
    ]
    return text, {"to_linear": float(means[DEFAULT])}


def around(found):
    """The test losses of a run's averages, [rates, lengths, averages, seeds], if none diverged."""
    losses = np.array(list(found["around"].values()), float)
    return losses[: len(losses) if np.isfinite(losses).all() else 2]


def regrets(found):
    """The loss above the best average of the run, relative: [rates, lengths, averages]."""
    losses = around(found).mean(-1)
    return losses / losses.min(-1, keepdims=True) - 1


def widths(results):
    """Question 3."""
    averages = next(iter(results.values()))["averages"]
    by_setting = {name: regrets(found) for name, found in results.items()}
    each = np.array([r.mean((0, 1)) for r in by_setting.values()])  # [settings, averages]
    worst = np.max([r.max((0, 1)) for r in by_setting.values()], axis=0)
    by_length = np.mean([r.mean(0) for r in by_setting.values()], axis=0)
    at = {name: i for i, name in enumerate(averages)}
    own = each[:, at[DEFAULT]]
    rows, better = [], []
    for name in averages:
        difference = each[:, at[name]] - own
        mean, se = difference.mean(), error(difference)
        cells = [share(x, 2) for x in [*by_length[:, at[name]], each[:, at[name]].mean()]]
        rows.append(
            [f"`{name}`", *cells, share(worst[at[name]], 1), f"{100 * mean:+.2f} ± {100 * se:.2f}"]
        )
        if name.startswith("width") and mean < -2 * se:
            better.append(name)
    others = ["0.999", "warmup(0.9999)", "half-life 5 %", "power(0)"]
    lost = [name for name in others if each[:, at[name]].mean() < own.mean()]
    text = [
        f"{answer(not better and not lost)} Mean regret of `ema()`: {share(own.mean(), 2)} of the "
        f"loss. Better than it in the mean, of the four others: {', '.join(lost) or 'none'}. "
        f"Widths that are better by two standard errors: {', '.join(better) or 'none'}.",
        "",
        "Test loss above the best average of the same run, relative, at the rate that suits "
        "`ema()` best and at half and twice that rate; the last column is the difference to "
        "`ema()` in points of percent, and its standard error over settings:",
        "",
        *table(["average", "1/8", "1/4", "1/2", "1", "mean", "worst", "minus `ema()`"], rows),
    ]
    return text, {"regret": float(own.mean())}


def annealing(results):
    """Question 4."""
    rows, all_wsd, all_own, all_none = [], [], [], []
    for name, found in results.items():
        _, _, wsd, own, none = np.array(found["foretold"], float).T
        kept = np.isfinite(wsd + own + none)
        wsd, own, none = np.log(wsd[kept]), np.log(own[kept]), np.log(none[kept])
        all_wsd, all_own, all_none = [*all_wsd, *wsd], [*all_own, *own], [*all_none, *none]
        cells = [np.corrcoef(x, wsd)[0, 1] for x in (own, none)]
        gaps = [np.mean(np.abs(np.expm1(x - wsd))) for x in (own, none)]
        rows.append([name, len(wsd), *(f"{c:.3f}" for c in cells), *(share(g) for g in gaps)])
    wsd, own, none = map(np.array, (all_wsd, all_own, all_none))
    correlation, gap = np.corrcoef(own, wsd)[0, 1], np.mean(np.abs(np.expm1(own - wsd)))
    of_none = np.corrcoef(none, wsd)[0, 1], np.mean(np.abs(np.expm1(none - wsd)))
    total = [f"{correlation:.3f}", f"{of_none[0]:.3f}", share(gap), share(of_none[1])]
    rows.append(["all", len(wsd), *total])
    text = [
        f"{answer(correlation >= 0.95 and gap <= 0.015)} Between the validation loss of `ema()` "
        "and that of the same run with its rate really brought to zero over the last fifth, over "
        f"all settings, rates and lengths: correlation of the logarithms {correlation:.3f}, mean "
        f"absolute difference {share(gap)} (without an average {of_none[0]:.3f} and "
        f"{share(of_none[1])}).",
        "",
        *table(
            ["setting", "pairs", "correlation", "no average", "mean difference", "no average"], rows
        ),
    ]
    return text, {"correlation": float(correlation), "gap": float(gap)}


def chosen_losses(found, rule):
    """Relative regrets to the best of the six: of the chosen, [rates, lengths, seeds]; of each."""
    index = [found["averages"].index(name) for name in CANDIDATES]
    losses = around(found)[:, :, index]
    picked = np.array([rules[rule] for rules in found["chosen"].values()])[: len(losses)]
    chosen = np.take_along_axis(losses, picked[:, :, None], axis=2)[:, :, 0]
    best = losses.min(2)
    return chosen / best - 1, losses / best[:, :, None] - 1


def by_batches(results):
    """Question 5."""
    rows, verdicts = [], {}
    for rule in RULES:
        small, never, gains = True, True, False
        for regime in REGIMES:
            here = [chosen_losses(f, rule) for n, f in results.items() if regime_of(n) == regime]
            if not here:
                continue
            chosen = np.concatenate([c.mean((0, 1)) for c, _ in here])
            each = np.concatenate([e.mean((0, 1)) for _, e in here], axis=-1)  # [six, runs]
            gain = each[CANDIDATES.index(DEFAULT)] - chosen
            above = max((c - e[:, :, CANDIDATES.index("0.999")]).max() for c, e in here)
            small, never = small and chosen.mean() <= 0.001, never and above <= 0
            gains = gains or gain.mean() > 2 * error(gain)
            of_each = [share(e.mean(), 2) for e in each]
            compared = f"{100 * gain.mean():+.2f} ± {100 * error(gain):.2f}"
            cells = [share(chosen.mean(), 2), *of_each, compared, share(max(above, 0))]
            rows.append([f"{regime}, by the {rule}", *cells])
        verdicts[rule] = small, never, gains
    holds = any(all(verdict) for verdict in verdicts.values())
    said = [
        f"by the {rule} of the looks: mean regret at most 0.1 % in every regime: {yes(small)}; "
        f"never worse than 0.999: {yes(never)}; better than `ema()` by two standard errors in a "
        f"regime: {yes(gains)}"
        for rule, (small, never, gains) in verdicts.items()
    ]
    always = [f"always {name}" for name in CANDIDATES]
    text = [
        f"{answer(holds)} Chosen {'. Chosen '.join(said)}.",
        "",
        "Test loss above the best of the six, relative, at the three rates of question 3. A look: "
        "the losses of the six on the next batch, once in 40 steps. Chosen is the least running "
        "mean.",
        "",
        *table(["", "chosen", *always, "`ema()` minus chosen", "most above 0.999"], rows),
    ]
    return text, {"holds": bool(holds)}


def same_as_optax(results):
    """Question 6."""
    apart = [
        np.abs(test(f, "schedule_free") / test(f, "primal power(0)") - 1)
        for f in results.values()
        if "schedule_free" in f["methods"]
    ]
    most, first = max(x.max() for x in apart), max(x[0].max() for x in apart)
    mean = np.mean([x.mean() for x in apart])
    text = [
        "By rounding, while the runs are short. The test losses of `optax.contrib.schedule_free` "
        f"and of `primal` with `power(0)` differ by at most {share(first, 2)} at an eighth of the "
        f"steps and by {share(mean, 2)} in the mean over all lengths; but single seeds come to "
        f"differ by up to {share(most, 1)}, since training enlarges what rounding begins "
        f"({len(apart)} settings)."
    ]
    return text, {"apart": float(most)}


def losses_of(results):
    """Every setting's table: test losses, and paired differences to linear."""
    lines = []
    for name, found in results.items():
        rows = []
        for method, shown in SHOWN.items():
            if method not in found["methods"]:
                continue
            known = found["methods"][method]
            means, (difference, se) = test(found, method).mean(-1), paired(found, method)
            cells = [
                f"{m:.4f}" + ("" if method == "linear" else f" ({d:+.4f} ± {s:.4f})")
                for m, d, s in zip(means, difference, se, strict=True)
            ]
            edge = "" if all(known["inside"]) else " (at the edge of the grid)"
            rates = " ".join(f"{rate:g}" for rate in dict.fromkeys(known["rate"]))
            wrong = np.mean(known["wrong"][-1])
            rows.append([shown, *cells, share(wrong, 2), rates + edge])
        head = ["", *(f"{n} steps" for n in found["lengths"]), "read wrong at the end", "rates"]
        lines += [f"### {name}, {found['seeds']} seeds", "", *table(head, rows), ""]
    return lines


def in_short(results):
    """How far one run at one rate is from the best of the decays tuned for each length."""
    methods = ("width 0.1", "primal power(0)", "none", "0.999")
    rows = []
    for name, found in results.items():
        apart = [test(found, m).mean(-1) / best_decay(found) - 1 for m in methods]
        rows.append([name, regime_of(name), *(f"{100 * x.mean():+.1f} %" for x in apart)])
    for regime in REGIMES:
        here = [found for name, found in results.items() if regime_of(name) == regime]
        if here:
            apart = [
                np.mean([test(found, m).mean(-1) / best_decay(found) - 1 for found in here])
                for m in methods
            ]
            rows.append([f"**all, {regime}**", regime, *(f"{100 * x:+.1f} %" for x in apart)])
    return [
        "Test loss of *one* run at *one* constant rate, in the mean over its four lengths, beside "
        "the best of all decays to zero that were tuned for each length (linear, cosine, WSD, "
        "linear after a warm-up; the best by the test loss):",
        "",
        *table(["setting", "data", *(SHOWN[m] for m in methods)], rows),
        "",
    ]


QUESTIONS = {
    "1. Training without a schedule": without_schedule,
    "2. An average alone": average_alone,
    "3. The width of the default": widths,
    "4. What annealing would give": annealing,
    "5. Chosen by the batches to come": by_batches,
    "6. Optax's schedule-free": same_as_optax,
}


def write():
    """Write the page, and print the answers."""
    results = json.loads((RESULTS / "schedules.json").read_text())
    missing = [name for name in PLANNED if name not in results]
    not_run = f" Planned and not run, for lack of time: {', '.join(missing)}." if missing else ""
    lines = [
        "# Training without a schedule",
        "",
        "Made by `python benchmarks/schedules.py run` and `report`. What was asked and how, and "
        "what would have been a no, was [written before](schedules_plan.md). Settings here: "
        f"{', '.join(results)}.{not_run}",
        "",
    ]
    lines += in_short(results)
    for title, question in QUESTIONS.items():
        text, _ = question(results)
        print(title, text[0], sep="\n")
        lines += [f"## {title}", "", *text, ""]
    lines += ["## All test losses", "", "In brackets: minus linear, with the standard error.", ""]
    lines += losses_of(results)
    (RESULTS / "schedules.md").write_text("\n".join(lines).rstrip() + "\n")


if __name__ == "__main__":
    write()
