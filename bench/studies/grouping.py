"""The distance of grouped neuron attribution from exact: ``python -m bench.studies.grouping [--out FILE.json]``.

Where memory is short, the published algorithm decomposes a layer's neurons in groups: a group's neurons are components,
all others are one component with the rest of the hidden state, and each group is carried through the network by itself.
That changes the components among which a neuron is shared, so the scores depend on the number of groups. Here the
scores of all neurons are compared with the exact ones (one group), for contiguous and for random groups, on the demo
model.

Groups are the prompts of one jagged batch: the same prompt once for every group, so the library itself does the work.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch
from torch import Tensor

from depass_fast import DePass, Neurons, Trace
from depass_fast.adapters import Adapter
from depass_fast.adjoint.estimate import spearman
from depass_fast.components.products import BoundProducts
from depass_fast.state.state import Factors

from ..core.agreement import spread, top_overlap
from ..core.cli import command, writable
from ..core.questions import Question, demo_model, questions
from ..core.results import environment, write_results

ROWS = 1 << 18  # the most rows of the component state at once


@dataclass(frozen=True, eq=False)
class GroupedNeurons(Neurons):
    """The neurons of one group for every prompt of a trace; all others stay in `rest`."""

    groups: Sequence[Tensor] = ()

    def bound(self, adapter: Adapter, trace: Trace, prompt: int) -> BoundProducts:
        products, here = super().bound(adapter, trace, prompt), self.groups[prompt]
        factors = products.products
        assert factors is not None and factors.coefficients is not None  # neurons are numbers times vectors
        chosen = Factors(factors.coefficients[:, here], factors.vectors[here])
        return replace(products, labels=tuple(products.labels[i] for i in here.tolist()), products=chosen)


@dataclass
class GroupingError:
    """The distance of scores in ``groups`` groups from exact; medians, p20 and p80 over prompts.

    ``relative_error`` is ‖grouped - exact‖ / ‖exact‖ over the neurons, ``max_error`` the largest difference over the
    largest exact score, ``sum_ratio`` the sum of all neurons' scores over that of the exact ones.
    """

    model: str
    layer: int
    grouping: str
    groups: int
    relative_error: dict
    max_error: dict
    spearman: dict
    top1_overlap: dict
    sum_ratio: dict
    n_prompts: int
    environment: dict = field(default_factory=dict)

    def as_dict(self) -> dict:
        return asdict(self)


def grouped_scores(library: DePass, question: Question, layer: int, groups: Sequence[Tensor]) -> Tensor:
    """The scores (I,) of a layer's neurons, each from the run of its own group. Groups hold every neuron once."""
    scores = torch.zeros(sum(map(len, groups)))
    for part in _parts(groups, len(question.ids)):
        trace = library.trace([question.ids] * len(part))
        trace = replace(trace, batch=True)  # one group is a batch, too
        results = library.attribute(trace, GroupedNeurons(layer, groups=part), question.target)
        for result, here in zip(results, part, strict=True):
            scores[here] = result.scores[: len(here)].float()
    return scores


def _parts(groups: Sequence[Tensor], length: int) -> Iterator[Sequence[Tensor]]:
    """Runs of groups whose state has at most ``ROWS`` rows."""
    each = max(1, ROWS // (length * (max(map(len, groups)) + 1)))
    for first in range(0, len(groups), each):
        yield groups[first : first + each]


def split(width: int, count: int, grouping: str, seed: int = 0) -> list[Tensor]:
    """``width`` neurons in ``count`` groups of equal size, as equal as can be: `contiguous`, or `random`."""
    order = torch.arange(width)
    if grouping == "random":
        order = torch.randperm(width, generator=torch.Generator().manual_seed(seed))
    return [part.sort().values for part in order.tensor_split(count)]


def measure(
    library: DePass, asked: Sequence[Question], layers: Sequence[int], counts: Sequence[int], place: dict
) -> Iterator[GroupingError]:
    """A row for every layer, grouping and number of groups."""
    width = library.adapter.layer(0).mlp.w_down.shape[1]
    for layer in layers:
        exact = [library.attribute(q.ids, Neurons(layer), q.target).scores[:width] for q in asked]
        only_way: dict[
            int, GroupingError
        ] = {}  # one group, and a group for every neuron: contiguous and random are the same
        for grouping in ("contiguous", "random"):
            for count in counts:
                if count in only_way:
                    yield replace(only_way[count], grouping=grouping)
                    continue
                figures = defaultdict(list)
                for number, (question, expected) in enumerate(zip(asked, exact, strict=True)):
                    groups = split(width, count, grouping, seed=number)
                    for name, value in compare(grouped_scores(library, question, layer, groups), expected).items():
                        figures[name].append(value)
                spreads = {name: spread(values) for name, values in figures.items()}
                row = GroupingError("demo", layer, grouping, count, **spreads, n_prompts=len(asked), environment=place)
                if count in (1, width):
                    only_way[count] = row
                yield row


def compare(scores: Tensor, exact: Tensor) -> dict[str, float]:
    """The figures of a :class:`GroupingError` for one prompt."""
    difference = scores - exact
    return {
        "relative_error": float(difference.norm() / exact.norm()),
        "max_error": float(difference.abs().max() / exact.abs().max()),
        "spearman": spearman(scores, exact),
        "top1_overlap": top_overlap(scores, exact),
        "sum_ratio": float(scores.sum() / exact.sum()),
    }


def main(arguments: list[str] | None = None) -> None:
    parser = command("bench.studies.grouping", __doc__)
    parser.add_argument("--out", type=writable, help="write the rows to this JSON file, after every one")
    parser.add_argument("--tiny", "--quick", action="store_true", help="one prompt, three numbers of groups")
    parser.add_argument("--prompts", type=int, help="default: 50; 1 with --tiny")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 3])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    began = time.monotonic()
    model, tokenizer = demo_model()
    asked = questions(tokenizer, options.prompts or (1 if options.tiny else 50))
    width = model.config.intermediate_size
    counts = (1, 4, 32) if options.tiny else [2**i for i in range(width.bit_length()) if 2**i <= width]
    rows: list[GroupingError] = []
    for row in measure(DePass(model), asked, options.layers[: 1 if options.tiny else None], counts, environment()):
        rows.append(row)
        print(
            f"layer {row.layer}  {row.grouping:10}  {row.groups:4} groups: relative error "
            f"{row.relative_error['median']:.2e}, largest {row.max_error['median']:.2e}, Spearman "
            f"{row.spearman['median']:.3f}, top 1 % {row.top1_overlap['median']:.2f}, "
            f"sum {row.sum_ratio['median']:.2f}×",
            flush=True,
        )
        if options.out:
            write_results(options.out, "grouping", rows, device="cpu", seconds=time.monotonic() - began)


if __name__ == "__main__":
    main()
