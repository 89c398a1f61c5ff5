"""The sections of RESULTS.md that `python -m bench.studies.rules` and `python -m bench.speed.ledger` fill."""

from __future__ import annotations

from ..core.markdown import duration, heading, mebibytes, table

TEXT = """{model}, {prompts} prompts that it answers rightly. Every method ranks the neurons, and the heads, of all
layers by its score in the answer's log-probability (in brackets: in its logit), signed or by size. The cells are the
share of prompts that are still answered rightly with {end} ranked masked, the mean over {shares}."""
TOKENS = """Tokens deleted from the prompt, ranked by their signed score: the answer's probability, the mean over 10 to
100 % of the tokens. Disrupt: the highest are deleted, lower is better. Recover: only the highest are kept, higher is
better."""
GOOD = {"lowest": "Higher is better.", "highest": "Lower is better."}
ORDER = ("shapley", "half", "taylor", "softmax", "gradient × activation", "norm", "random")
KINDS, RANKINGS = ("neurons", "heads"), ("signed", "by size")


def section(result: dict) -> str:
    """`bench.studies.rules`: both ends of the rankings masked, and tokens deleted."""
    parts = [heading(f"Rules, {result['model']}", result["environment"])]
    for end in ("lowest", "highest"):
        shares = " and ".join(f"{_percents(result['shares'][kind][end])} of all {kind}" for kind in KINDS)
        text = TEXT.format(model=result["model"], prompts=result["prompts"], end=f"the {end}", shares=shares)
        parts.append(f"{text} {GOOD[end]}".replace("\n", " "))
        parts.append(masking(result, end))
    return "\n\n".join([*parts, TOKENS.replace("\n", " "), deletion(result)])


def masking(result: dict, end: str) -> str:
    """The table of one end of the rankings."""
    header = ["ranked by", *(f"{kind}, {ranking}" for kind in KINDS for ranking in RANKINGS)]
    rows = [
        [name, *(_cell(result["masked"][kind], name, ranking, end) for kind in KINDS for ranking in RANKINGS)]
        for name in ORDER
    ]
    return table(header, rows, left=1)


def _cell(rankings: dict, name: str, ranking: str, end: str) -> str:
    alone = rankings.get(f"{name}, -, by size")  # knows of no target
    if alone is not None:
        return f"{_mean(alone[end]):.2f}"
    log_prob, logit = (rankings[f"{name}, {read}, {ranking}"][end] for read in ("log-prob", "logit"))
    return f"{_mean(log_prob):.2f} ({_mean(logit):.2f})"


def deletion(result: dict) -> str:
    """The table of deleted tokens."""
    header = ["ranked by", "disrupt, log-probability", "recover, log-probability", "disrupt, logit", "recover, logit"]
    rows = []
    for name in ORDER:
        found = [result["deleted"].get(f"{name}, {read}") for read in ("log-prob", "logit")]
        alone = result["deleted"].get(f"{name}, -")
        if alone or found[0]:
            both = [alone, alone] if alone else found
            rows.append([name, *(f"{one[measure]:.3f}" for one in both if one for measure in ("disrupt", "recover"))])
    return table(header, rows, left=1)


def speed(result: dict) -> str:
    """`bench.speed.ledger`: times and peaks beside those of the gradient."""
    goals, rows = result["goals"], result["rows"]
    text = (
        f"Goals: the ledger at most {goals['time']:g}× the time of gradient × activation, and {goals['memory']:g}× its "
        f"peak of memory; the exact softmax rule for the neurons of all layers (a middle layer's time, times layers) "
        f"at least {goals['exact']:g}× the ledger's time."
    )
    header = ["workload", "way", "model", "threads", "time", "[p20, p80]", "of the gradient", "all layers", "peak"]
    lines = [
        [
            row["workload"],
            row["provider"],
            row["model"],
            str(row["threads"]),
            duration(row["median_s"]),
            f"[{duration(row['p20_s'])}, {duration(row['p80_s'])}]",
            f"{row['ratio']:.2f}×",
            "-" if row["all_layers_s"] is None else duration(row["all_layers_s"]),
            mebibytes(row["peak_bytes"]),
        ]
        for row in rows
    ]
    return "\n\n".join([heading("Ledger", result["environment"]), text, table(header, lines)])


def _mean(values: list[float]) -> float:
    return sum(values) / len(values)


def _percents(shares: list[float]) -> str:
    return ", ".join(f"{100 * share:g}" for share in shares) + " %"
