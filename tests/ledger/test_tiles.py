"""A way back in small pieces: tiles of attention, chunks of an MLP, and memory that runs out give the same numbers."""

import pytest
import torch

from depass_fast import LogProb
from depass_fast.ledger import attention, attribute, mlp
from tests.support.ledgers import distance, flat
from tests.support.models import build, random_ids
from tests.support.shortage import Shortage

PROMPTS = [random_ids(9), random_ids(1, seed=1), random_ids(5, seed=2)]
READS = {"target": [1, LogProb(2)], "position": [-1, 0]}


def answers(dp, trace, **options):
    """All neurons, heads and tokens of a ledger."""
    ledger = dp.ledger(trace, **READS, **options)
    return flat([ledger.tokens(), ledger.heads(), ledger.neurons()])


def same(found, expected):
    return max(map(distance, found, expected)) <= 1e-13


@pytest.mark.parametrize("name", ["llama-gqa", "mistral-window", "qwen2-window"])
@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1], [PROMPTS[0]] * 3], ids=["jagged", "one", "equal"])
def test_tiles_of_any_size_give_the_same(name, prompts, monkeypatch):
    """From a single query of one KV head to all prompts at once; windows cut what a tile of queries sees."""
    dp, counts, tiles = build(name, torch.float64), [], attention._tiles
    monkeypatch.setattr(attention, "_tiles", lambda *given: counts.append(len(list(tiles(*given)))) or tiles(*given))
    trace = dp.trace(prompts)
    whole = answers(dp, trace)
    assert set(counts) == {1}
    for most in (1, 20, 50, 200, 400):
        counts.clear()
        monkeypatch.setattr(attention, "_CPU_TILE", most)
        assert same(answers(dp, trace), whole)
        assert max(counts) > 1 or most >= 400


@pytest.mark.parametrize("name", ["llama-biases", "qwen2"])
def test_a_small_memory_budget_gives_the_same(name, monkeypatch):
    dp, sizes, places = build(name, torch.float64), [], mlp.WayThroughMlp._places

    def watched(self, *given):
        for part in places(self, *given):
            sizes.append(len(part.packed))
            yield part

    monkeypatch.setattr(mlp.WayThroughMlp, "_places", watched)
    trace = dp.trace(PROMPTS)
    whole = answers(dp, trace)
    assert max(sizes) == 15
    for budget, most in ((1, 1), (1 << 16, 3)):
        sizes.clear()
        assert same(answers(dp, trace, memory_budget=budget), whole)
        assert max(sizes) == most


@pytest.mark.parametrize("budget", [None, 1 << 24])
def test_a_way_back_that_runs_out_of_memory_is_begun_again_with_half(budget, monkeypatch):
    dp, walk_back = build("llama-biases", torch.float64), attribute.walk_back
    trace = dp.trace(PROMPTS)

    def run(at):
        shortage, workspaces = Shortage(at), []

        def watched(*given):
            workspaces.append(given[8])
            with shortage:
                return walk_back(*given)

        with monkeypatch.context() as patch:
            patch.setattr(attribute, "walk_back", watched)
            return answers(dp, trace, memory_budget=budget), workspaces, shortage.count

    whole, (workspace,), total = run(-1)
    assert workspace == (budget or attribute.CPU_WORKSPACE) and total > 100
    for at in (1, total // 3, 2 * total // 3, total):
        with pytest.warns(RuntimeWarning, match="carrying on with a workspace"):
            found, workspaces, _ = run(at)
        assert workspaces == [workspace, workspace // 2] and same(found, whole)


def test_a_way_back_that_always_runs_out_of_memory_says_what_to_do(monkeypatch):
    def fail(*_):
        raise error

    dp, error = build("llama-gqa", torch.float64), torch.OutOfMemoryError("CUDA out of memory")
    monkeypatch.setattr(attribute, "walk_back", fail)
    with pytest.warns(RuntimeWarning), pytest.raises(torch.OutOfMemoryError, match="fewer targets at once"):
        dp.ledger(PROMPTS)
    error = RuntimeError("something else")
    with pytest.raises(RuntimeError, match="something else"):
        dp.ledger(PROMPTS)
