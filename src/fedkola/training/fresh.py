"""A new language model: a folder with random weights and a tokenizer learnt from public text.

The tokenizer is byte-level BPE (Sennrich et al., ACL 2016; Radford et al., 2019), so that every
text has tokens. Its merges tell which strings are frequent in the text it was learnt from: a
tokenizer learnt from private text is a release of that text. Equal arguments give equal files.
"""

import gzip
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from fedkola.errors import DataError, ModelMismatch, PlanError
from fedkola.training.model import quiet

Architecture = Literal["gpt2", "llama", "bert"]
ARCHITECTURES: tuple[Architecture, ...] = ("gpt2", "llama", "bert")
END, PAD, MASK, FIRST, LAST = "<|endoftext|>", "[PAD]", "[MASK]", "[CLS]", "[SEP]"
BYTES = 256
HEAD_WIDTH = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The size of a new model; ``heads`` 0 is one for every 32 of the width."""

    architecture: Architecture = "gpt2"
    width: int = 128
    layers: int = 5
    heads: int = 0
    vocabulary: int = 4096
    length: int = 128


def architecture(name: str) -> Architecture:
    """The architecture called so; raises PlanError for another name."""
    for known in ARCHITECTURES:
        if name == known:
            return known
    raise PlanError(f"architecture {name!r} was given; expected one of {', '.join(ARCHITECTURES)}")


def lines(path: Path) -> list[str]:
    """The lines of a text file, plain or gzip, that hold any text; raises DataError."""
    try:
        content = path.read_bytes()
        if content[:2] == b"\x1f\x8b":
            content = gzip.decompress(content)
        return [line for line in content.decode("utf-8").splitlines() if line.strip()]
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        raise DataError(
            f"{path} cannot be read as text ({error}); give a UTF-8 text file, plain or gzip"
        ) from error


def create(folder: Path, shape: Shape, texts: Sequence[str], *, seed: int) -> int:
    """Write a new model folder and return the number of its parameters.

    ``texts`` must be public. Raises PlanError for a shape that cannot be, DataError for too little
    text, ModelMismatch if the folder is not empty.
    """
    _check(shape)
    if folder.exists() and any(folder.iterdir()):
        raise ModelMismatch(f"{folder} is not empty; give a new folder for the model")
    tokenizer = learn(shape, texts)
    with torch.random.fork_rng(devices=[]), quiet():
        torch.manual_seed(seed)
        model = _model(shape, tokenizer)
        folder.mkdir(parents=True, exist_ok=True)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    return int(sum(value.numel() for value in model.parameters()))


def learn(shape: Shape, texts: Sequence[str]) -> Any:
    """A byte-level BPE tokenizer of at most ``shape.vocabulary`` tokens, learnt from ``texts``.

    A causal model's has one special token that begins and ends texts, an encoder's the five of
    BERT. Raises DataError if the texts are too few for a single merge.
    """
    special = [PAD, FIRST, LAST, MASK] if shape.architecture == "bert" else [END, PAD]
    base = tokenizers.Tokenizer(models.BPE())
    base.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    base.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=shape.vocabulary,
        special_tokens=special,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    base.train_from_iterator(texts, trainer)
    if base.get_vocab_size() <= BYTES + len(special):
        raise DataError(
            f"{len(texts)} texts of {sum(map(len, texts))} characters hold no pair of characters "
            "twice, so there is nothing to learn a tokenizer from; give more public text"
        )
    if shape.architecture == "bert":
        last, first = special.index(LAST), special.index(FIRST)
        base.post_processor = processors.BertProcessing((LAST, last), (FIRST, first))
        names = {"pad_token": PAD, "cls_token": FIRST, "sep_token": LAST, "mask_token": MASK}
    else:
        base.post_processor = processors.ByteLevel(trim_offsets=False)
        names = {"bos_token": END, "eos_token": END, "pad_token": PAD}
    fast: Any = transformers.PreTrainedTokenizerFast
    return fast(tokenizer_object=base, model_max_length=shape.length, **names)


# --- private --------------------------------------------------------------------------------------


def _check(shape: Shape) -> None:
    heads = _heads(shape)
    if min(shape.width, shape.layers, heads) < 1 or shape.width % heads or shape.width % 2:
        raise PlanError(
            f"width {shape.width}, {shape.layers} layers and {heads} heads were given; expected "
            "an even width that the heads divide, and at least one layer"
        )
    if shape.architecture == "llama" and (shape.width // heads) % 2:
        raise PlanError(f"llama needs heads of even width; {shape.width // heads} was given")
    if shape.vocabulary < BYTES + 16 or shape.length < 8:
        raise PlanError(
            f"vocabulary {shape.vocabulary} and length {shape.length} were given; expected at "
            f"least {BYTES + 16} tokens (all bytes and some merges) and a length of 8 or more"
        )


def _heads(shape: Shape) -> int:
    return shape.heads or max(1, shape.width // HEAD_WIDTH)


def _model(shape: Shape, tokenizer: Any) -> Any:
    size, heads = len(tokenizer), _heads(shape)
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    if shape.architecture == "gpt2":
        return transformers.GPT2LMHeadModel(
            transformers.GPT2Config(
                vocab_size=size,
                n_positions=shape.length,
                n_embd=shape.width,
                n_layer=shape.layers,
                n_head=heads,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
                **ends,
            )
        )
    if shape.architecture == "llama":
        return transformers.LlamaForCausalLM(
            transformers.LlamaConfig(
                vocab_size=size,
                max_position_embeddings=shape.length,
                hidden_size=shape.width,
                intermediate_size=32 * round(8 * shape.width / 3 / 32),
                num_hidden_layers=shape.layers,
                num_attention_heads=heads,
                num_key_value_heads=heads,
                tie_word_embeddings=True,
                **ends,
            )
        )
    return transformers.BertForMaskedLM(
        transformers.BertConfig(
            vocab_size=size,
            max_position_embeddings=shape.length,
            hidden_size=shape.width,
            intermediate_size=4 * shape.width,
            num_hidden_layers=shape.layers,
            num_attention_heads=heads,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
