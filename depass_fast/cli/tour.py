"""The tour that ``depass-fast demo`` takes through the small model that comes with the library."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..components.model import Heads, Neurons, Tokens
from ..demo import demo_prompts, load_demo
from ..engine import DePass
from ..results.attribution import Attribution
from ..results.layered import LayeredAttribution
from ..results.render import aligned, legend, rich_table, rows_of_pairs, token_line
from ..trace.record import Trace

_LEADING = 5  # components in a table


def tour(console: Console) -> None:
    """Show an indirect object by tokens and heads, then one fact in two languages by tokens and neurons."""
    dp = DePass(*load_demo())
    size = sum(p.numel() for p in dp.model.parameters()) / 1e6
    console.print(
        f"A Llama of {size:.1f} M parameters and {dp.adapter.n_layers} layers completes sentences. Where do its "
        "answers come from?",
        highlight=False,
    )
    facts = _one_fact_in_two_languages()
    errors = [*_indirect_object(console, dp), *_fact(console, dp, facts)]

    console.rule("[bold]Completeness", style="dim")
    console.print(
        f"In each of these {len(errors)} decompositions the shares sum to the logit; the largest relative error is "
        f"{max(errors):.1e}.\nA head's or a neuron's share includes all that later layers make of its output, so the "
        "shares of different layers overlap.",
        highlight=False,
    )
    console.rule("[bold]Next", style="dim")
    prompt = facts["English"]
    console.print(
        Text(
            f'depass-fast attribute --model demo --prompt "{prompt}" --components tokens\n\n'
            "from depass_fast import DePass, Tokens\n"
            'dp = DePass.from_pretrained("path/to/model")\n'
            f'print(dp.attribute("{prompt}", Tokens()))'
        )
    )


def _one_fact_in_two_languages() -> dict[str, str]:
    """The first fact about somebody's language, as a prompt in English and in French."""
    prompts = [p for p in demo_prompts("facts") if p.relation == "language" and p.phrasing == 0]
    entity = prompts[0].entity
    return {
        name: next(p.text for p in prompts if (p.entity, p.language) == (entity, code))
        for name, code in (("English", "en"), ("French", "fr"))
    }


def _indirect_object(console: Console, dp: DePass) -> list[float]:
    """Show who is given something, and the heads that tell both names apart. Return the completeness errors."""
    prompt = demo_prompts("ioi", count=1)[0]
    console.rule("[bold]Who gets it?", style="dim")
    trace, pair = dp.trace(prompt.text), (prompt.answer, prompt.distractor)
    tokens: Attribution = dp.attribute(trace, Tokens(), [None, pair])
    _show_tokens(console, dp, prompt.text, trace, tokens)
    heads: LayeredAttribution = dp.attribute(trace, Heads(layers="all"), pair)
    title = f"The leading heads of all layers, for {prompt.answer.strip()} rather than {prompt.distractor.strip()}"
    _show_side_by_side(console, {title: heads.top(_LEADING)})
    return _errors(tokens, heads)


def _fact(console: Console, dp: DePass, prompts: dict[str, str]) -> list[float]:
    """Show one fact in several languages, and the neurons behind each. Return the completeness errors."""
    console.rule("[bold]One fact, two languages", style="dim")
    tables: dict[str, list[tuple[str, float]]] = {}
    errors = []
    for language, text in prompts.items():
        trace = dp.trace(text)
        tokens: Attribution = dp.attribute(trace, Tokens(), [None])
        _show_tokens(console, dp, text, trace, tokens)
        neurons: LayeredAttribution = dp.attribute(trace, Neurons(layers="all"))
        tables[f"The leading neurons in {language}"] = neurons.top(_LEADING)
        errors += _errors(tokens, neurons)
    _show_side_by_side(console, tables)
    shared = set.intersection(*({label for label, share in table if share > 0} for table in tables.values()))
    if shared:
        console.print(Text(f"In both languages: {', '.join(sorted(shared))}", style="bold"), "")
    return errors


def _errors(tokens: Attribution, layers: LayeredAttribution) -> list[float]:
    return [tokens.completeness_error, *(layer.completeness_error for layer in layers)]


def _show_tokens(console: Console, dp: DePass, text: str, trace: Trace, tokens: Attribution) -> None:
    """Print the answer to ``text`` with its probability, and the tokens' shares in every target.

    The first target is the answer's logit, a second one a logit difference.
    """
    coloured = console.color_system is not None or console.record
    answer = tokens.target_ids[0]
    probability = dp.adapter.logits(trace.normed_final[-1]).softmax(-1)[answer].item()
    name_of_answer = dp.tokenizer.decode([answer]) if dp.tokenizer is not None else str(answer)
    console.print(Text.assemble("\n", text, (name_of_answer, "bold underline"), f"   p = {probability:.1%}\n"))
    for name, scores, what in zip(tokens.target_names, tokens.scores, ("logit", "logit difference"), strict=False):
        title = Text.assemble((name, "bold"), f"  {what} {scores.sum():.2f}  ")
        if coloured:
            shares = scores.tolist()
            line = token_line(tokens.tokens, shares, console.encoding)
            console.print(title + legend(shares), line, "", sep="\n")
        else:
            console.print(title)
    if not coloured:
        console.print(Text("\n".join(aligned(tokens, console.width, console.encoding))), "", sep="\n")


def _show_side_by_side(console: Console, tables: dict[str, list[tuple[str, float]]]) -> None:
    grid = Table.grid(padding=(0, 4, 0, 0))
    grid.add_row(*(f"[bold]{title}" for title in tables))
    grid.add_row(*(rich_table(rows_of_pairs(pairs), 14, console.encoding) for pairs in tables.values()))
    console.print(grid, "")
