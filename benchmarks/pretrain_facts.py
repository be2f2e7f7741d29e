"""The base model of the causal lane of ``facts``: a small Llama that knows the language, no fact.

It reads questions and answers about made-up entities that no stream ever holds (a hash of the name
decides), in all phrasings, so it knows how questions are asked, which values answer which of them,
and how an answer ends. Facts of a stream it can only learn later. The tokenizer has a token for
every word of the language and two for every syllable of names. Loss on all tokens, AdamW, one
thread: the same weights on one kind of machine. About 1 M parameters, minutes on one core.
Run: ``python benchmarks/pretrain_facts.py FOLDER [STEPS]``.
"""

import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedkola.evaluation.tasks.facts import ATTRIBUTES, SYLLABLES, entities, vocabulary
from fedkola.knowledge.stream import seeded

SEED = 11
ENTITIES = 256
STEPS = 3000
BATCH = 64
LR = 1e-3
WARM_UP = 100
PAD, UNK, START, END = "[PAD]", "[UNK]", "[BOS]", "[EOS]"


def main() -> None:
    folder = Path(sys.argv[1])
    steps = int(sys.argv[2]) if sys.argv[2:] else STEPS
    torch.set_num_threads(1)
    began = time.perf_counter()
    for step, loss in write(folder, steps=steps):
        if step % 100 == 0 or step == steps:
            print(f"step {step}  loss {loss:.3f}  {time.perf_counter() - began:.0f} s", flush=True)


def write(folder: Path, *, steps: int) -> Iterator[tuple[int, float]]:
    """Train, yielding (step, mean loss of a token); the folder is there once it is exhausted."""
    tokenizer = make_tokenizer()
    with torch.random.fork_rng():
        torch.manual_seed(SEED)
        model = LlamaForCausalLM(config(len(tokenizer)))
    ids = [tokenizer(START + text + END)["input_ids"] for text in sentences()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=LR, weight_decay=0.01, fused=True)
    chance = seeded(SEED, "batches")
    model.train()
    for step in range(1, steps + 1):
        for group in optimiser.param_groups:
            group["lr"] = LR * min(1.0, step / WARM_UP, (steps + 1 - step) / (0.3 * steps))
        rows = chance.sample(ids, BATCH)
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        # Padding is at the end, where a causal model does not look; its id is 0 and never wanted.
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.transpose(1, 2), tokens[:, 1:], ignore_index=0)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        yield step, loss.item()
    model.eval().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def config(size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )


def sentences() -> list[str]:
    """Every phrasing of every fact of the public entities, with its answer."""
    found = []
    for name in entities(ENTITIES, seed=SEED, public=True):
        for attribute, about in ATTRIBUTES.items():
            value = seeded(SEED, name, attribute).choice(about.values)
            found += [f"{ask.format(name)} {value}" for ask in (*about.asked, about.tested)]
    return found


def make_tokenizer() -> PreTrainedTokenizerFast:
    names = [PAD, UNK, START, END, *vocabulary(), *(f"##{syllable}" for syllable in SYLLABLES)]
    places = {name: place for place, name in enumerate(dict.fromkeys(names))}
    inner = Tokenizer(models.WordPiece(places, unk_token=UNK))
    inner.normalizer = normalizers.Lowercase()
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token=PAD,
        unk_token=UNK,
        bos_token=START,
        eos_token=END,
        model_max_length=64,
    )


if __name__ == "__main__":
    main()
