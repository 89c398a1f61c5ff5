"""The tour that ``depass-fast demo`` takes through the small model that comes along."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..components.base import ComponentKind
from ..components.model import Heads, Neurons, Tokens
from ..demo import demo_prompts, load_demo
from ..engine import DePass
from ..results.render import aligned, leading, legend, rich_table, token_line


def tour(console: Console) -> None:
    """An indirect object by tokens and heads, then one fact in two languages by tokens and neurons."""
    engine = DePass(*load_demo())
    size = sum(p.numel() for p in engine.model.parameters()) / 1e6
    console.print(
        f"A Llama of {size:.1f} M parameters and {engine.adapter.n_layers} layers completes sentences. Where do its "
        "answers come from?",
        highlight=False,
    )

    prompt = demo_prompts("ioi", count=1)[0]
    console.rule("[bold]Who gets it?", style="dim")
    names = f"{prompt.answer.strip()} rather than {prompt.distractor.strip()}"
    heads, errors = _step(console, engine, prompt.text, Heads, (prompt.answer, prompt.distractor))
    _side_by_side(console, {f"The leading heads of all layers, for {names}": heads})

    known = [p for p in demo_prompts("facts") if p.relation == "language" and p.phrasing == 0]
    pair = [next(p for p in known if (p.entity, p.language) == (known[0].entity, lang)) for lang in ("en", "fr")]
    console.rule("[bold]One fact, two languages", style="dim")
    tables = {}
    for fact, language in zip(pair, ("English", "French"), strict=True):
        tables[f"The leading neurons in {language}"], more = _step(console, engine, fact.text, Neurons)
        errors += more
    _side_by_side(console, tables)
    shared = set.intersection(*({label for label, share in table if share > 0} for table in tables.values()))
    if shared:
        console.print(Text(f"In both languages: {', '.join(sorted(shared))}", style="bold"), "")

    console.rule("[bold]Completeness", style="dim")
    console.print(
        f"In each of these {len(errors)} decompositions the shares sum to the logit; largest relative error "
        f"{max(errors):.1e}.\nA head's or a neuron's share holds all that later layers make of it, so the shares of "
        "different layers overlap.",
        highlight=False,
    )
    console.rule("[bold]Next", style="dim")
    console.print(
        Text(
            f'depass-fast attribute --model demo --prompt "{pair[0].text}" --components tokens\n\n'
            "from depass_fast import DePass, Tokens\n"
            'dp = DePass.from_pretrained("path/to/model")\n'
            f'print(dp.attribute("{pair[0].text}", Tokens()))'
        )
    )


def _step(
    console: Console, engine: DePass, text: str, kind: type[ComponentKind], contrast: Sequence[str] = ()
) -> tuple[list[tuple[str, float]], list[float]]:
    """Print the answer to ``text`` and the tokens' shares in it, and in the difference of the two ``contrast`` tokens.

    Returns the five leading components of all layers for the last of these targets, and the completeness errors.
    """
    coloured = console.color_system is not None or console.record
    trace = engine.trace(text)
    targets = [None, tuple(contrast)] if contrast else [None]
    tokens = engine.attribute(trace, Tokens(), targets)
    logits = engine.adapter.logits(trace.normed_final[-1])
    answer = tokens.target_ids[0]
    probability = logits.softmax(-1)[answer].item()
    said = engine.tokenizer.decode([answer])

    console.print(Text.assemble("\n", text, (said, "bold underline"), f"   p = {probability:.1%}\n"))
    for name, scores, what in zip(tokens.target_names, tokens.scores, ("logit", "logit difference"), strict=False):
        title = Text.assemble((name, "bold"), f"  {what} {scores.sum():.2f}  ")
        if coloured:
            shares = scores.tolist()
            console.print(title + legend(shares), token_line(tokens.tokens, shares), "", sep="\n")
        else:
            console.print(title)
    if not coloured:
        console.print(Text("\n".join(aligned(tokens, console.width))), "", sep="\n")

    layers = [engine.attribute(trace, kind(layer), targets[-1]) for layer in range(engine.adapter.n_layers)]
    ranked = sorted((pair for result in layers for pair in result.top(5)), key=lambda pair: -abs(pair[1]))
    return ranked[:5], [result.completeness_error for result in (tokens, *layers)]


def _side_by_side(console: Console, tables: dict[str, list[tuple[str, float]]]) -> None:
    grid = Table.grid(padding=(0, 4, 0, 0))
    grid.add_row(*(f"[bold]{title}" for title in tables))
    grid.add_row(*(rich_table(leading(pairs), width=14) for pairs in tables.values()))
    console.print(grid, "")
