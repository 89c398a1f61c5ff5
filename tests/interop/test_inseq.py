"""DePass as an attribution method of inseq."""

import warnings

import pytest
import torch

from depass_fast import DePass, Tokens
from depass_fast.demo import load_demo

inseq = pytest.importorskip("inseq")
import depass_fast.inseq  # noqa: E402, F401 (registers the method)

PROMPT, FULL = "Nyria Morstam speaks", "Nyria Morstam speaks Italian."


@pytest.fixture(scope="module")
def loaded():
    model, tokenizer = load_demo()
    return inseq.load_model(model, "depass", tokenizer=tokenizer, device="cpu"), DePass(model, tokenizer)


def sequences(model, *args, **kwargs):
    out = model.attribute(*args, show_progress=False, **kwargs)
    return out, out.sequence_attributions


def expected(dp, prompt, full, **options):
    """The shares (N, G) of all tokens in every generated one; NaN where a token is not yet there."""
    ids, start = dp.tokenizer.encode(full), len(dp.tokenizer.encode(prompt))
    scores = torch.full((len(ids), len(ids) - start), float("nan"))
    for n in range(start, len(ids)):
        scores[:n, n - start] = dp.attribute(ids[:n], Tokens(options.get("layer", 0)), ids[n]).scores[:n]
    return scores


@pytest.mark.parametrize("options", [{}, {"layer": 2}, {"layer": "blocks.1.hook_resid_post"}])
def test_every_generated_token_is_attributed(loaded, options):
    model, dp = loaded
    out, (sequence,) = sequences(model, PROMPT, FULL, **options)
    want = expected(dp, PROMPT, FULL, **options)
    got = sequence.target_attributions
    assert got.shape[1] == want.shape[1] >= 1
    assert torch.allclose(got.nan_to_num(), want[: len(got)].nan_to_num(), atol=1e-4)
    assert out.info["attribution_method"] == "depass" and out.info["attributed_fn"] == "logit_fn"
    assert [token.id for token in sequence.target] == dp.tokenizer.encode(FULL)
    sequence.aggregate()
    out.show(display=False, return_html=True)


def test_a_list_of_texts(loaded):
    model, _ = loaded
    prompts, full = [PROMPT, "In truth: Nyria Morstam speaks"], [FULL, "In truth: Nyria Morstam speaks Italian."]
    _, together = sequences(model, prompts, full)
    for prompt, text, batched in zip(prompts, full, together, strict=True):
        _, (alone,) = sequences(model, prompt, text)
        assert [t.token for t in batched.target] == [t.token for t in alone.target]
        a, b = batched.target_attributions.nan_to_num(), alone.target_attributions.nan_to_num()
        assert torch.allclose(a, b, atol=1e-4)


def test_a_step_of_a_padded_batch(loaded, monkeypatch):
    """Prompts of different lengths, as inseq hands them over when it generates: padding is no token."""
    model, dp = loaded
    seen, attribute = [], DePass.attribute
    monkeypatch.setattr(
        DePass, "attribute", lambda self, p, *args, **kw: (seen.append(len(p)), attribute(self, p, *args, **kw))[1]
    )
    prompts = [PROMPT, "In truth: Nyria Morstam speaks"]
    ids = [dp.tokenizer.encode(prompt) for prompt in prompts]
    width = max(map(len, ids))
    padded = torch.tensor([[0] * (width - len(row)) + row for row in ids])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
    targets = torch.tensor([[5], [6]])
    step = model.attribution_method.attribute_step(
        {"additional_forward_args": (padded, targets, None, mask)}, {"temperature": 0.2}
    )
    assert seen == [2]
    for row, keep, prompt, target in zip(step.target_attributions, mask.bool(), ids, (5, 6), strict=True):
        alone = attribute(dp, prompt, Tokens(), target, temperature=0.2).scores
        assert torch.allclose(row[keep], alone, atol=1e-5) and not row[~keep].any()


def test_the_shares_sum_to_the_logit(loaded):
    model, _ = loaded
    _, (sequence,) = sequences(model, PROMPT, FULL, step_scores=["logit"])
    shares = sequence.target_attributions.nan_to_num().sum(0)
    assert torch.allclose(shares, sequence.step_scores["logit"], atol=1e-3)  # this model has no constants


@pytest.mark.parametrize("name", ["contrast_logits_diff", "contrast_logits"])
def test_a_contrast_of_logits_is_a_sum_of_shares(loaded, name):
    model, dp = loaded
    other = f"{PROMPT} French."
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # inseq's own, on contrasts as attributed functions
        _, (sequence,) = sequences(
            model, PROMPT, FULL, attributed_fn=name, contrast_targets=other, step_scores=[name], layer=1
        )
    prompt, full = dp.tokenizer.encode(PROMPT), dp.tokenizer.encode(FULL)
    got = sequence.target_attributions.nan_to_num()
    for step, against in enumerate(dp.tokenizer.encode(other)[len(prompt) :]):
        before = full[: len(prompt) + step]
        target = against if name == "contrast_logits" else (full[len(before)], against)
        alone = dp.attribute(before, Tokens(1), target).scores[: len(before)]
        assert torch.allclose(got[: len(before), step], alone, atol=1e-4)
    assert float(got[:, 0].sum()) == pytest.approx(float(sequence.step_scores[name][0]), abs=1e-3)


def test_what_a_contrast_needs(loaded):
    model, _ = loaded
    contrast = {"attributed_fn": "contrast_logits_diff"}
    with pytest.raises(ValueError, match="contrast_targets: needed for a contrast"):
        sequences(model, PROMPT, FULL, **contrast)
    with pytest.raises(ValueError, match="contrast_force_inputs: a contrast is decomposed after the original"):
        sequences(model, PROMPT, FULL, **contrast, contrast_targets=f"{PROMPT} French.", contrast_force_inputs=True)
    with pytest.raises(ValueError, match="contrast_prob_diff_fn is no logit and no difference of logits"):
        sequences(model, PROMPT, FULL, attributed_fn="contrast_prob_diff", contrast_targets=f"{PROMPT} French.")


def test_only_logits_are_sums_of_shares(loaded):
    model, _ = loaded
    with pytest.raises(ValueError, match="attributed_fn: entropy_fn is no logit"):
        sequences(model, PROMPT, FULL, attributed_fn="entropy")
    with pytest.raises(TypeError, match="unknown option 'temprature'"):
        inseq.load_model(model.model, "depass", tokenizer=model.tokenizer, device="cpu", temprature=1)
