"""Composites that worker processes make while a GPU trains, kept in its memory and drawn again.

A core composes some hundreds of pictures a second and a GPU trains on thousands: so it never waits
for new ones once there are a few, and the cores set only how soon the pool is full.
"""

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch

from dreambooth_lib.families.device_copies import to_device
from tools.toybox import drawings, judge
from tools.toybox.recipes import Recipe
from tools.toybox.world import Picture, World

CHUNK = 64  # pictures that a worker makes at a time
VIEWS = 10  # of each scene, in each chunk's worker
_worlds: dict[str, World] = {}  # in a worker process


def _end_with(parent: int) -> None:
    """Wait for the end of a parent that was killed, which tells its workers nothing."""
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(1)


def _open(pack: Path, recipe: Recipe, parent: int) -> None:
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()
    every = {"plain": tuple(drawings.TRAINING_SETS), "pairs": tuple(drawings.EVERY_SET)}
    seed = multiprocessing.current_process()._identity[0]  # other views in every worker
    for kind, sets in every.items():
        _worlds[kind] = World(pack, VIEWS, seed, sets, recipe.size, recipe.pairs)


def _plain(index: int, _: Recipe) -> tuple[np.ndarray, list[Picture]]:
    return _worlds["plain"].batch(CHUNK, np.random.default_rng((15, index)))


def _pairs(index: int, recipe: Recipe) -> tuple[np.ndarray, list[Picture]]:
    # The judge is to measure the held-out subjects, so it knows the hand that drew them.
    draw = judge.drawn_anew(_worlds["pairs"], recipe.batches["judge"])
    shown, pixels = draw(np.random.default_rng((16, index)))
    return np.asarray(pixels()), shown


class Pool:
    """Chunks of composites as they come; a source for trainings (:class:`sources.Source`)."""

    def __init__(self, chunks: list[Future], device: str):
        self._coming = list(reversed(chunks))
        self._device = torch.device(device)
        self._pixels = torch.empty(0)
        self._shown: list[list[Picture]] = []

    def gather(self, least: int) -> None:
        """Take in what has come, and wait until there are ``least`` chunks."""
        while self._coming and (len(self._shown) < least or self._coming[-1].done()):
            pixels, shown = self._coming[-1].result()
            if not self._shown:
                room = (len(self._coming), *pixels.shape)
                self._pixels = torch.empty(room, dtype=torch.uint8, device=self._device)
            self._pixels[len(self._shown)] = torch.from_numpy(pixels).to(self._device)
            self._shown.append(shown)
            self._coming.pop()

    def batch(self, count: int, rng: np.random.Generator) -> tuple[torch.Tensor, list[Picture]]:
        """Return pictures at random of those that there are: uint8 [count, H, W, 3]."""
        self.gather(-(-count // CHUNK))
        of, at = np.divmod(rng.integers(len(self._shown) * CHUNK, size=count), CHUNK)
        pixels = self._pixels[to_device(of, self._device), to_device(at, self._device)]
        return pixels, [self._shown[i][j] for i, j in zip(of, at, strict=True)]

    def chunk(self, rng: np.random.Generator) -> tuple[list[Picture], Callable[[], torch.Tensor]]:
        """Return a whole chunk at random (:data:`judge.Draw`)."""
        self.gather(1)
        index = rng.integers(len(self._shown))
        return self._shown[index], lambda: self._pixels[index]

    def chunks(self) -> Iterator[tuple[torch.Tensor, list[Picture]]]:
        """Yield all of it, when all has come."""
        self.gather(len(self._shown) + len(self._coming))
        yield from zip(self._pixels, self._shown, strict=True)


class Makers:
    """The worker processes; to be made before the GPU is used, which a fork of them could not."""

    def __init__(self, pack: Path, recipe: Recipe, workers: int):
        self._recipe = recipe
        self._executor = ProcessPoolExecutor(
            workers, multiprocessing.get_context("fork"), _open, (pack, recipe, os.getpid())
        )

    def plain(self, count: int, device: str) -> Pool:
        """``count`` composites of one or two things, as the base is trained on."""
        return self._of(_plain, -(-count // CHUNK), device)

    def pairs(self, count: int, device: str) -> Pool:
        """``count`` composites as the judge is trained on, a batch of it in each chunk."""
        return self._of(_pairs, max(1, count // (4 * self._recipe.batches["judge"])), device)

    def _of(self, make: Callable, chunks: int, device: str) -> Pool:
        coming = [self._executor.submit(make, index, self._recipe) for index in range(chunks)]
        return Pool(coming, device)

    def close(self) -> None:
        self._executor.shutdown(wait=True, cancel_futures=True)
