"""What masking costs a site, beside flwr's own secaggplus functions, in one run.

Ten million parameters in 148 tensors, the shapes of a GPT of twelve layers, eight sites with a
threshold of six: eight masks for each. Both do what one site does in one exchange.
- masking: keys, shares, integers to masked integers, reveal. Ours through ``Member``, where keys
  and shares of an epoch of 64 exchanges count with a 64th; flwr 1.41 through ``_setup``,
  ``_share_keys``, the functions that ``_collect_masked_vectors`` calls after rounding, and
  ``_unmask`` of its client mod, with its default ranges
- with message: ours with framing, checksum, the kept answer and the flushed log on disk; flwr with
  the protobuf of its answer
- with rounding: the first of these from float32 deltas on; flwr by ``_collect_masked_vectors``
Time is processor time of one process with one thread. Both take turns, so that a load of the
machine hits both. The bound is what nothing over AES-256-CTR can go below: the same streams, made
and added in cache, measured in the same turn.
Writes ``benchmarks/results/masking.json`` and ``masking.md``.
Run: ``python benchmarks/masking.py`` (about one minute).
"""

import importlib
import json
import tempfile
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import AES256
from cryptography.hazmat.primitives.ciphers.modes import CTR
from flwr.app import ConfigRecord, RecordDict
from flwr.common import ndarrays_to_parameters
from flwr.common.secure_aggregation.secaggplus_constants import Key
from flwr.common.serde import recorddict_to_proto
from torch import Tensor

from fedkola import wire
from fedkola.engines.in_process import InProcess
from fedkola.evaluation import machine, metrics
from fedkola.privacy import masks, secure_sum
from fedkola.privacy.member import ASK, REVEAL, Rules
from fedkola.privacy.secure_sum import SecureSum
from fedkola.types import Broadcast, Grid, Update, Weights

# A function of the same name hides the module from a plain import.
flower = importlib.import_module("flwr.client.mod.secure_aggregation.secaggplus_mod")

SITES, THRESHOLD, EXCHANGES, REPETITIONS = 8, 6, 64, 6
WIDTH, LAYERS, VOCABULARY, LENGTH = 256, 12, 1024, 256
STEPS = {16: 12, 32: 24}
"""Bits of an addend by the word of its ring."""

SETTINGS = {
    Key.SAMPLE_NUMBER: SITES,
    Key.SHARE_NUMBER: SITES,
    Key.THRESHOLD: THRESHOLD,
    Key.CLIPPING_RANGE: 8.0,
    Key.TARGET_RANGE: 1 << 22,
    Key.MOD_RANGE: 1 << 32,
    Key.MAX_WEIGHT: 1000.0,
}
"""Those of flwr by default."""

RESULTS = Path(__file__).parent / "results"
Times = dict[str, float]


def shapes() -> dict[str, tuple[int, ...]]:
    """Every parameter of a GPT of twelve layers; ten million numbers."""
    found: dict[str, tuple[int, ...]] = {"wte": (VOCABULARY, WIDTH), "wpe": (LENGTH, WIDTH)}
    for layer in range(LAYERS):
        found |= {
            f"h.{layer}.{name}": shape
            for name, shape in {
                "ln_1.weight": (WIDTH,),
                "ln_1.bias": (WIDTH,),
                "attn.c_attn.weight": (WIDTH, 3 * WIDTH),
                "attn.c_attn.bias": (3 * WIDTH,),
                "attn.c_proj.weight": (WIDTH, WIDTH),
                "attn.c_proj.bias": (WIDTH,),
                "ln_2.weight": (WIDTH,),
                "ln_2.bias": (WIDTH,),
                "mlp.c_fc.weight": (WIDTH, 4 * WIDTH),
                "mlp.c_fc.bias": (4 * WIDTH,),
                "mlp.c_proj.weight": (4 * WIDTH, WIDTH),
                "mlp.c_proj.bias": (WIDTH,),
            }.items()
        }
    return found | {"ln_f.weight": (WIDTH,), "ln_f.bias": (WIDTH,)}


def main() -> None:
    torch.set_num_threads(1)
    deltas = {
        name: torch.from_numpy(np.random.default_rng(i).normal(0, 1e-3, shape).astype(np.float32))
        for i, (name, shape) in enumerate(shapes().items())
    }
    theirs = Flower(deltas)
    rows: dict[str, list[Times]] = {"flwr": [], "16": [], "32": []}
    counted: dict[str, Mapping[str, int]] = {}
    with tempfile.TemporaryDirectory() as folder:
        ours = {word: Ours(Path(folder) / str(word), deltas, word) for word in STEPS}
        for turn in range(REPETITIONS + 1):
            found = {"flwr": theirs.turn(), **{str(w): one.turn() for w, one in ours.items()}}
            for name, times in found.items():
                # The first turn warms caches and opens the epoch.
                if turn:
                    rows[name].append(times)
        counted = {"flwr": theirs.bytes(), **{str(w): one.bytes() for w, one in ours.items()}}
    write(rows, counted, sum(value.numel() for value in deltas.values()))


# --- ours -----------------------------------------------------------------------------------------


class Ours:
    """Eight sites of one run; the work of the first is timed."""

    def __init__(self, folder: Path, deltas: Weights, word: int) -> None:
        self._word = word
        self._deltas = deltas
        scale = dict.fromkeys(deltas, 16 if word == 16 else 26) | {wire.WEIGHT: 0}
        self._grid = Grid(word=word, bits=STEPS[word], scale=scale)  # type: ignore[arg-type]
        names = tuple(f"site-{i}" for i in range(SITES))
        rules = Rules(plan_hash=bytes(32), manifest_hash=bytes(32))
        enrolled = secure_sum.enrol(folder, {name: folder / name for name in names}, rules)
        self._members = {name: enrolled.member(name, folder / name) for name in names}
        self._inner = 0.0
        work = self._members["site-0"]._masked
        self._members["site-0"]._masked = partial(self._timed, work)  # type: ignore[method-assign]
        self._spent: dict[str, float] = {}
        self._sent: dict[str, int] = {}
        self._round = 0
        answers = {name: partial(self._answer, name) for name in names}
        self._clients = SecureSum(
            InProcess(answers),
            roster=enrolled.roster,
            key=enrolled.key,
            folder=folder,
            rules=rules,
            exchanges=EXCHANGES,
        )
        self._words = self._rounded()

    def turn(self) -> Times:
        """Processor seconds of the first site, and of the bound."""
        began = time.process_time()
        self._words = self._rounded()
        rounding = time.process_time() - began
        self._round += 1
        asked = Broadcast(
            round=self._round,
            step="add",
            cohort=tuple(self._members),
            tensors={},
            grid=self._grid,
            algorithm={"name": "Addition"},
        )
        total = self._clients.sum(asked.cohort, asked)
        for name, value in self._words.items():
            if not torch.equal(total.words[name].to(torch.int64), SITES * value.to(torch.int64)):
                raise RuntimeError(f"the masked sum of {name} is wrong")
        opening = sum(v for step, v in self._spent.items() if step not in (ASK, REVEAL))
        around = self._spent[REVEAL] + opening / EXCHANGES
        return {
            "masking": self._inner + around,
            "with message": self._spent[ASK] + around,
            "with rounding": self._inner + around + rounding,
            "keys and shares": opening / EXCHANGES,
            "bound": self._bound(),
        }

    def bytes(self) -> dict[str, int]:
        """Sent by the first site in one exchange."""
        opened = sum(v for s, v in self._sent.items() if s not in (ASK, REVEAL))
        return {"up": self._sent[ASK] + self._sent[REVEAL] + opened // EXCHANGES}

    def _answer(self, name: str, message: bytes) -> bytes:
        began = time.process_time()
        asked = wire.unpack_broadcast(message)
        answer = self._members[name].answer(asked, message, lambda question: self._words)
        if name == "site-0":
            self._spent[asked.step] = time.process_time() - began
            self._sent[asked.step] = len(answer)
        return answer

    def _rounded(self) -> dict[str, Tensor]:
        update = Update(client="site-0", tensors=self._deltas, weight=1)
        return wire.words(update, self._grid, tuple(self._members))

    def _timed(self, work: Callable[..., object], *given: object) -> object:
        began = time.process_time()
        found = work(*given)
        self._inner = time.process_time() - began
        return found

    def _bound(self) -> float:
        """The same streams, and as many additions in cache, without anything around them."""
        size = sum(v.numel() for v in self._deltas.values()) * self._word // 8
        buffer, zeros = bytearray(masks.CHUNK_BYTES), bytes(masks.CHUNK_BYTES)
        mask = np.frombuffer(buffer, dtype=masks.MEMORY[self._word])
        sums = np.zeros_like(mask)
        chunks = size // masks.CHUNK_BYTES

        def made() -> None:
            for i in range(SITES):
                stream = Cipher(AES256(bytes([i]) * 32), CTR(bytes(16))).encryptor()
                for _ in range(chunks):
                    stream.update_into(zeros, buffer)

        def added() -> None:
            for _ in range(SITES * chunks):
                np.add(sums, mask, out=sums)

        return timed(made) + timed(added)


# --- flwr -----------------------------------------------------------------------------------------


class Flower:
    """Eight clients of flwr's mod; the work of the first is timed."""

    def __init__(self, deltas: Weights) -> None:
        self._arrays = [value.numpy() for value in deltas.values()]
        self._sent = 0

    def turn(self) -> Times:
        clients = [flower.SecAggPlusState() for _ in range(SITES)]
        spent = 0.0
        public = {}
        for i, state in enumerate(clients):
            state.nid = i
            began = time.process_time()
            found = flower._setup(state, ConfigRecord(SETTINGS))
            if not i:
                spent += time.process_time() - began
                self._sent = measured(found)
            public[str(i)] = [found[Key.PUBLIC_KEY_1], found[Key.PUBLIC_KEY_2]]
        sealed = []
        for i, state in enumerate(clients):
            began = time.process_time()
            found = flower._share_keys(state, ConfigRecord(public))
            if not i:
                spent += time.process_time() - began
                self._sent += measured(found)
            for to, content in zip(
                found[Key.DESTINATION_LIST], found[Key.CIPHERTEXT_LIST], strict=True
            ):
                if to == 0:
                    sealed.append((i, content))
        first = clients[0]
        given = ConfigRecord(
            {
                Key.SOURCE_LIST: [i for i, _ in sealed],
                Key.CIPHERTEXT_LIST: [content for _, content in sealed],
            }
        )
        parameters = ndarrays_to_parameters(self._arrays)
        began = time.process_time()
        found = flower._collect_masked_vectors(first, given, 1000, parameters)
        whole = time.process_time() - began
        self._sent += measured(found)
        framing = timed(lambda: recorddict_to_proto(packed(found)).SerializeToString())
        masking = self._masking(first, [i for i, _ in sealed])
        everyone = ConfigRecord(
            {Key.ACTIVE_NODE_ID_LIST: list(range(SITES)), Key.DEAD_NODE_ID_LIST: []}
        )
        began = time.process_time()
        found = flower._unmask(first, everyone)
        spent += time.process_time() - began
        self._sent += measured(found)
        return {
            "masking": spent + masking,
            "with message": spent + masking + framing,
            "with rounding": spent + whole,
            "keys and shares": spent,
        }

    def bytes(self) -> dict[str, int]:
        """Content of its messages without any framing."""
        return {"up": self._sent}

    def _masking(self, state: Any, others: list[int]) -> float:
        """What ``_collect_masked_vectors`` does to integers, by the functions that it calls."""
        settings = SETTINGS
        rounded = flower.quantize(
            self._arrays, settings[Key.CLIPPING_RANGE], settings[Key.TARGET_RANGE]
        )
        vector = flower.factor_combine(1 << 22, rounded)
        places = [value.shape for value in vector]
        modulus = settings[Key.MOD_RANGE]

        def made() -> None:
            own = flower.pseudo_rand_gen(state.rd_seed, modulus, places)
            total = flower.parameters_addition(vector, own)
            for i in others:
                key = flower.generate_shared_key(
                    flower.bytes_to_private_key(state.sk1),
                    flower.bytes_to_public_key(state.public_keys_dict[i][0]),
                )
                mask = flower.pseudo_rand_gen(key, modulus, places)
                total = flower.parameters_subtraction(total, mask)
            for value in flower.parameters_mod(total, modulus):
                flower.ndarray_to_bytes(value)

        return timed(made)


# --- results --------------------------------------------------------------------------------------


def write(
    rows: Mapping[str, list[Times]], counted: Mapping[str, Mapping[str, int]], size: int
) -> None:
    names = {"flwr": "flwr 1.41 secaggplus", "16": "MaskedSum, Z_2^16", "32": "MaskedSum, Z_2^32"}
    table = {}
    for name, found in rows.items():
        row = {part: metrics.interval([times[part] for times in found]) for part in found[0]}
        if name != "flwr":
            for part in ("masking", "with message", "with rounding"):
                ratios = [a[part] / b[part] for a, b in zip(rows["flwr"], found, strict=True)]
                row[f"times less than flwr, {part}"] = metrics.interval(ratios)
            for part in ("masking", "with message"):
                shares = [times["bound"] / times[part] for times in found]
                row[f"share of the bound, {part}"] = metrics.interval(shares)
        table[names[name]] = row
    up = {names[name]: value["up"] for name, value in counted.items()}
    ratio = {
        name: up["flwr 1.41 secaggplus"] / value
        for name, value in up.items()
        if not name.startswith("flwr")
    }
    found = {
        "machine": machine.describe(),
        "parameters": size,
        "sites": SITES,
        "threshold": THRESHOLD,
        "repetitions": REPETITIONS,
        "seconds and ratios": table,
        "bytes up": up,
        "bytes, times fewer than flwr": ratio,
        "turns": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "masking.json").write_text(json.dumps(found, indent=1) + "\n")
    lines = [
        "# What masking costs a site",
        "",
        f"{size:,} parameters, {SITES} sites, one thread; mean and 95 % interval of "
        f"{REPETITIONS} turns.",
        "",
        "| | measure | mean | low | high |",
        "|---|---|---|---|---|",
    ]
    for name, row in table.items():
        for part, value in row.items():
            unit = "" if "flwr," in part or "bound," in part else " (s)"
            numbers = " | ".join(f"{value[k]:.4g}" for k in ("mean", "low", "high"))
            lines.append(f"| {name} | {part}{unit} | {numbers} |")
    for name, value in up.items():
        fewer = f"; {ratio[name]:.4f} times fewer than flwr" if name in ratio else ""
        lines.append(f"| {name} | bytes up | {value:,}{fewer} | | |")
    text = "\n".join(lines) + "\n"
    (RESULTS / "masking.md").write_text(text)
    print(text)


def timed(work: Callable[[], None]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began


def packed(found: Mapping[str, Any]) -> RecordDict:
    """The content of its answer, as its mod makes it."""
    return RecordDict({"secaggplus": ConfigRecord(dict(found), False)})


def measured(content: object) -> int:
    """Bytes of what a message holds, lists and keys included, numbers as eight bytes."""
    if isinstance(content, bytes):
        return len(content)
    if isinstance(content, Mapping):
        return sum(len(str(key)) + measured(value) for key, value in content.items())
    if isinstance(content, list):
        return sum(map(measured, content))
    return 8


if __name__ == "__main__":
    main()
