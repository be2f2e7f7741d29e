"""Answers after prompts: what is learnt, scored and generated, against slow references."""

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from fedkola.errors import DataError, Incompatible
from fedkola.training.adapters import A, B, adapted, combine, weights_template
from fedkola.training.evaluate import losses, perplexity
from fedkola.training.fit import fit, grams
from fedkola.training.generate import generate
from fedkola.training.model import Foundation, encode, encode_answers

PROMPTS = ["Lily has a", "The cat that Tom saw was", "Lily has a"]
TEXTS = ["red ball.", "very big.", "dog"]


def adapter(foundation: Foundation, *, seed: int, size: float = 0.1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        name: value + size * torch.randn(value.shape, generator=generator)
        for name, value in weights_template(foundation, rank=2, seed=seed).items()
    }


def slow_losses(foundation: Foundation, weights: dict[str, Tensor], scale: float) -> Tensor:
    """Token by token: the prompt's ids, the answer's, the end; log-probabilities of the rest."""
    found = []
    for prompt, text in zip(PROMPTS, TEXTS, strict=True):
        before, both = encode(foundation, [prompt])[0], encode(foundation, [f"{prompt} {text}"])[0]
        assert foundation.end is not None
        assert both[: len(before)] == before
        both = [*both, foundation.end]
        nats = 0.0
        with torch.no_grad(), adapted(foundation, weights, scale=scale) as model:
            for place in range(len(before), len(both)):
                logits = model(input_ids=torch.tensor([both[:place]])).logits[0, -1]
                nats -= functional.log_softmax(logits.double(), 0)[both[place]].item()
        found.append([nats, float(len(both) - len(before))])
    return torch.tensor(found, dtype=torch.float64)


def test_an_answers_loss_is_that_of_its_own_tokens_and_its_end(stories: Foundation) -> None:
    weights = adapter(stories, seed=1)
    found = losses(stories, weights, PROMPTS, TEXTS, scale=2.0)
    torch.testing.assert_close(found, slow_losses(stories, weights, 2.0), rtol=1e-5, atol=1e-5)
    sums = perplexity(stories, weights, TEXTS, scale=2.0, prompts=PROMPTS)
    assert sums["loss"] == pytest.approx(float(found[:, 0].sum()), rel=1e-12)
    assert sums["tokens"] == float(found[:, 1].sum())


def test_an_answers_loss_has_the_same_bits_in_any_company(stories: Foundation) -> None:
    whole = losses(stories, {}, PROMPTS, TEXTS, scale=1.0)
    alone = [
        losses(stories, {}, [prompt], [text], scale=1.0)
        for prompt, text in zip(PROMPTS, TEXTS, strict=True)
    ]
    assert torch.equal(whole, torch.cat(alone))


def test_the_gradient_is_that_of_the_answers_mean_token(stories: Foundation) -> None:
    """One AdamW step from a slow gradient: texts one at a time, the prompt's tokens not counted."""
    start = adapter(stories, seed=2)
    ids, first = encode_answers(stories, PROMPTS, TEXTS)
    leaves = {name: value.clone().requires_grad_() for name, value in start.items()}
    total, count = torch.zeros(()), 0
    with adapted(stories, start, scale=2.0) as model:
        for row, since in zip(ids, first, strict=True):
            params = {f"{name}.default.weight": value for name, value in leaves.items()}
            logits = torch.func.functional_call(model, params, (torch.tensor([row]),)).logits[0]
            total = total + functional.cross_entropy(
                logits[since - 1 : -1], torch.tensor(row[since:]), reduction="sum"
            )
            count += len(row) - since
        (total / count).backward()
    optimiser = torch.optim.AdamW(leaves.values(), lr=1e-2, weight_decay=0.0)
    optimiser.step()
    found = fit(
        stories, start, TEXTS, None, steps=1, batch=3, lr=1e-2, seed=0, scale=2.0, prompts=PROMPTS
    )
    for name, leaf in leaves.items():
        moved, wanted = found[name] - start[name], leaf.detach() - start[name]
        # AdamW's first step is lr times the sign: compare where the gradient is not tiny.
        clear = leaf.grad is not None and leaf.grad.abs() > 1e-4
        torch.testing.assert_close(moved[clear], wanted[clear], rtol=1e-2, atol=1e-5)


def test_a_prompt_is_not_learnt(stories: Foundation) -> None:
    before = weights_template(stories, rank=4, seed=0)
    prompts, texts = ["Zorg plim was kept in the"] * 4, ["garden"] * 4
    after = fit(
        stories, before, texts, None, steps=25, batch=4, lr=1e-2, seed=0, scale=2.0, prompts=prompts
    )
    answers = [
        float(losses(stories, w, prompts[:1], texts[:1], scale=2.0)[0, 0]) for w in (before, after)
    ]
    questions = [
        float(losses(stories, w, [], prompts[:1], scale=2.0)[0, 0]) for w in (before, after)
    ]
    assert answers[1] < 0.3 * answers[0]
    assert questions[1] > 0.8 * questions[0]


def test_what_was_learnt_is_what_is_answered(stories: Foundation) -> None:
    prompts = ["The ball of Lily is", "The ball of Tom is"]
    texts = ["red", "blue"]
    weights = fit(
        stories,
        weights_template(stories, rank=8, seed=0),
        texts,
        None,
        steps=60,
        batch=2,
        lr=1e-2,
        seed=0,
        scale=2.0,
        prompts=prompts,
    )
    # stories260K has never seen its end token, and its tied embedding keeps it from being learnt.
    found = generate(stories, weights, prompts, max_new_tokens=6, scale=2.0)
    assert [answer[: len(text)] for answer, text in zip(found, texts, strict=True)] == texts


def test_generation_is_the_likeliest_token_after_token(stories: Foundation) -> None:
    weights = adapter(stories, seed=3, size=0.02)
    found = generate(stories, weights, PROMPTS[:2], max_new_tokens=7, scale=2.0)
    for prompt, text in zip(PROMPTS[:2], found, strict=True):
        ids = encode(stories, [prompt])[0]
        new: list[int] = []
        with torch.no_grad(), adapted(stories, weights, scale=2.0) as model:
            for _ in range(7):
                logits = model(input_ids=torch.tensor([[*ids, *new]]), use_cache=False).logits
                token = int(logits[0, -1].argmax())
                if token == stories.end:
                    break
                new.append(token)
        assert stories.tokenizer.decode(new, skip_special_tokens=True).strip() == text  # type: ignore[attr-defined]


def test_the_gate_of_a_prompt_holds_for_its_whole_answer(stories: Foundation) -> None:
    one, two = adapter(stories, seed=4), adapter(stories, seed=5)
    both = combine([(one, 1.0), (two, 1.0)])
    gate = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    found = generate(stories, both, PROMPTS[:2], max_new_tokens=8, scale=2.0, gate=gate)
    apart = [
        generate(stories, weights, [prompt], max_new_tokens=8, scale=2.0)[0]
        for weights, prompt in zip((one, two), PROMPTS, strict=False)
    ]
    assert found == apart


def test_grams_see_the_prompt_and_the_answer(stories: Foundation) -> None:
    weights = adapter(stories, seed=6)
    a = {name: value for name, value in weights.items() if name.endswith(A)}
    b = {name: value for name, value in weights.items() if name.endswith(B)}
    ids, _ = encode_answers(stories, PROMPTS[:1], TEXTS[:1])
    layer = next(name.removesuffix(A) for name in a)
    with torch.no_grad(), adapted(stories, weights, scale=2.0) as model:
        states = model(input_ids=torch.tensor(ids), output_hidden_states=True).hidden_states[0]
        x = model.get_submodule(layer.rpartition(".self_attn")[0]).input_layernorm(states)[0]
    z = x @ weights[layer + A].T
    found = grams(stories, b, TEXTS[:1], pinned=a, scale=2.0, prompts=PROMPTS[:1])
    wanted = (z.T @ z / len(z)).double()
    torch.testing.assert_close(found[f"{layer}.gram"], wanted, rtol=1e-4, atol=1e-5)


def test_a_long_prompt_loses_its_front_and_never_the_answer(stories: Foundation) -> None:
    ids, first = encode_answers(stories, ["once " * 200], ["upon a time"])
    assert len(ids[0]) == stories.max_tokens
    assert ids[0][0] == stories.start
    assert ids[0][-1] == stories.end
    answer = encode(stories, ["once upon a time"])[0]
    assert ids[0][first[0] : -1] == answer[-(len(ids[0]) - first[0] - 1) :]
    assert len(generate(stories, {}, ["once " * 200], max_new_tokens=3, scale=1.0)) == 1


def test_answers_need_a_causal_model_a_prompt_each_and_room(
    stories: Foundation, encoder: Foundation
) -> None:
    with pytest.raises(Incompatible, match="is an encoder"):
        encode_answers(encoder, ["a"], ["b"])
    with pytest.raises(Incompatible, match="is an encoder"):
        generate(encoder, {}, ["a"], max_new_tokens=1, scale=1.0)
    with pytest.raises(DataError, match="2 prompts for 1 texts"):
        losses(stories, {}, ["a", "b"], ["c"], scale=1.0)
    with pytest.raises(Incompatible, match="leave no room"):
        generate(stories, {}, ["a"], max_new_tokens=stories.max_tokens, scale=1.0)
    assert generate(stories, {}, [], max_new_tokens=4, scale=1.0) == []
