"""A small vision transformer with random weights, for audits of pictures."""

import hashlib
from typing import Any

import torch
import transformers

from fedkola.errors import Incompatible
from fedkola.training.model import Foundation


def small_vit(
    *, image: int, patch: int, width: int, layers: int = 2, classes: int = 10, seed: int = 0
) -> Foundation:
    """A ViT for grey pictures of ``image`` x ``image`` pixels, in patches, with learned positions.

    It reads pictures, so it has no tokenizer. Raises Incompatible if the patches do not fit.
    """
    if image % patch or width % 4:
        raise Incompatible(
            f"pictures of {image} pixels, patches of {patch}, width {width}; expected patches that "
            "divide the picture and a width that four heads divide"
        )
    configured: Any = transformers.ViTConfig
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model: Any = transformers.ViTForImageClassification(
            configured(
                image_size=image,
                patch_size=patch,
                num_channels=1,
                hidden_size=width,
                num_hidden_layers=layers,
                num_attention_heads=4,
                intermediate_size=2 * width,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
                num_labels=classes,
            )
        )
    digest = hashlib.sha256(b"fedkola/vit/1")
    for name, value in sorted(model.state_dict().items()):
        digest.update(name.encode() + value.numpy().tobytes())
    return Foundation(
        name=f"vit-{width}",
        kind="encoder",
        model=model.eval().requires_grad_(False),
        tokenizer=_no_text,
        hash=digest.hexdigest(),
        width=width,
        max_tokens=(image // patch) ** 2 + 1,
    )


def _no_text(*given: Any, **more: Any) -> Any:
    raise Incompatible("a vision transformer reads pictures; there are no tokens")
