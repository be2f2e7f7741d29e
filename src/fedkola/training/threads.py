"""Small passes of equal lengths, side by side, each on one thread.

torch would split every operation between threads: at places that depend on their number, so bits
would too, and with a barrier after each, which costs most where other work shares the cores.
"""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Protocol, TypeVar

import torch

P = TypeVar("P")
R = TypeVar("R")


class Map(Protocol):
    def __call__(self, run: Callable[[P], R], parts: Sequence[P]) -> list[R]:
        """Results in the order of ``parts``."""
        ...


@contextmanager
def side_by_side() -> Iterator[Map]:
    """A map over parts, as many at a time as torch would use threads; restores the setting."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield _in_turn
        return
    # The caller too: threads of its own would spin for a while after each of its operations.
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:

            def together(run: Callable[[P], R], parts: Sequence[P]) -> list[R]:
                return list(pool.map(run, parts))

            yield together
    finally:
        torch.set_num_threads(threads)


def equal_lengths(ids: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """Rows of equally long texts, at most ``rows`` together, longest first; empty ones left out."""
    by_length: dict[int, list[int]] = {}
    for row, tokens in enumerate(ids):
        by_length.setdefault(len(tokens), []).append(row)
    by_length.pop(0, None)
    return [
        same[start : start + rows]
        for _, same in sorted(by_length.items(), reverse=True)
        for start in range(0, len(same), rows)
    ]


def filled(ids: Sequence[Sequence[int]], asked: Sequence[int], rows: int) -> torch.Tensor:
    """Tokens (rows, L) of the texts asked for, the last one repeated until the pass is full."""
    repeated = [*asked, *[asked[-1]] * (rows - len(asked))]
    return torch.tensor([ids[row] for row in repeated])


def _in_turn(run: Callable[[P], R], parts: Sequence[P]) -> list[R]:
    return [run(part) for part in parts]
