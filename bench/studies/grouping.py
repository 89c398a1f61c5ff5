"""The distance of grouped neuron attribution from exact: ``python -m bench.studies.grouping [--out FILE.json]``.

Where memory is short, the published algorithm decomposes a layer's neurons in groups: a group's neurons are components,
all others are one component with the rest of the hidden state, and each group is carried through the network by itself.
That changes the components among which a neuron is shared, so the scores depend on the number of groups. Here the
scores of all neurons are compared with the exact ones (one group), for contiguous and for random groups, on the demo
model. ``depass-fast evaluate grouping`` does the same on any model, with time and peak memory.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace

import torch

from depass_fast import DePass, Neurons
from depass_fast.evaluate.studies.grouping import compare, grouped_scores, split

from ..core.agreement import spread
from ..core.cli import command, writable
from ..core.questions import Question, demo_model, questions
from ..core.results import environment, write_results

FIGURES = ("relative_error", "max_error", "spearman", "top1_overlap", "sum_ratio")


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
                    scores = grouped_scores(library, question.ids, layer, groups, question.target)
                    for name, value in compare(scores, expected).items():
                        figures[name].append(value)
                spreads = {name: spread(figures[name]) for name in FIGURES}
                row = GroupingError("demo", layer, grouping, count, **spreads, n_prompts=len(asked), environment=place)
                if count in (1, width):
                    only_way[count] = row
                yield row


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
