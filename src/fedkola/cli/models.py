"""The group ``fedkola model``: make a new model folder, take the trained one out of a run."""

from pathlib import Path
from typing import Annotated

import typer

from fedkola.cli.text import AsJson, Folder, examples, print_json

app = typer.Typer(help="Make new language models, and export trained ones.", no_args_is_help=True)


@app.command(
    epilog=examples(
        "fedkola model new --text public.txt --out models/small",
        "fedkola model new --architecture llama --width 256 --text public.txt --out models/llama",
        "fedkola model new --architecture bert --vocabulary 8192 --text a.txt --text b.txt --out m",
    )
)
def new(
    text: Annotated[
        list[Path], typer.Option(help="PUBLIC text for the tokenizer, a line each; repeatable.")
    ],
    out: Annotated[Path, typer.Option(help="New folder for the model.")],
    architecture: Annotated[str, typer.Option(help="gpt2, llama or bert.")] = "gpt2",
    width: Annotated[int, typer.Option(help="Width of a hidden state.")] = 128,
    layers: Annotated[int, typer.Option(help="Layers.")] = 5,
    heads: Annotated[int, typer.Option(help="Attention heads; 0 is one for 32 of the width.")] = 0,
    vocabulary: Annotated[int, typer.Option(help="Tokens, at most.")] = 4096,
    length: Annotated[int, typer.Option(help="Tokens that the model reads at most.")] = 128,
    seed: Annotated[int, typer.Option(help="Seed of the random weights.")] = 0,
    as_json: AsJson = False,
) -> None:
    """Write a model with random weights and a byte-level tokenizer learnt from public text.

    The tokenizer tells which strings are frequent in the text it was learnt
    from, and every site gets it: one learnt from private text is a release of
    that text. Give text that is public.
    """
    from fedkola.training import fresh

    texts = [line for path in text for line in fresh.lines(path)]
    shape = fresh.Shape(
        architecture=fresh.architecture(architecture),
        width=width,
        layers=layers,
        heads=heads,
        vocabulary=vocabulary,
        length=length,
    )
    count = fresh.create(out, shape, texts, seed=seed)
    if as_json:
        print_json({"folder": str(out), "parameters": count, "texts": len(texts)})
        return
    print(f"{architecture} of {count:,} parameters: {out}")
    print(f"its tokenizer was learnt from {len(texts):,} lines, which are public from now on")


@app.command(
    epilog=examples(
        "fedkola model export runs/pretrained --to models/medical",
    )
)
def export(
    folder: Folder,
    to: Annotated[Path, typer.Option(help="New folder for the model.")],
    as_json: AsJson = False,
) -> None:
    """Write the model that a run has pre-trained as a folder that transformers loads."""
    from fedkola.evaluation import session as sessions

    session = sessions.resume(folder)
    with session.ledger:
        written = sessions.export_model(session, to)
    if as_json:
        print_json({"folder": str(written)})
        return
    print(f"exported to {written}")
