"""Reads the samples of the next steps in a thread of its own, while a step is computed."""

from __future__ import annotations

import dataclasses
import threading
import time
from collections import deque
from collections.abc import Mapping
from types import TracebackType
from typing import Any

from typing_extensions import Self

from shearing.data.mixture.sampler import Batch, Mixture


class Prefetcher:
    """Deals the batches of coming steps in a background thread; what it returns never depends on how far that got.

    It deals at most `depth` steps ahead, and weights announced after s steps hold from step s + depth on, the first
    that cannot have been dealt yet. The state it saves is that of the steps taken, not of those dealt ahead.

    Args:
        mixture: not to be used directly while the prefetcher lives; it starts at `mixture.next_sample`.
        sequences_per_step: global batch size, over all ranks.
        rank, world_size: this process takes the rank-th of world_size equal slices of each step.
        depth: steps dealt ahead.

    Raises:
        ValueError: the ranks cannot share a step equally.
    """

    def __init__(
        self, mixture: Mixture, *, sequences_per_step: int, rank: int = 0, world_size: int = 1, depth: int = 2
    ) -> None:
        if sequences_per_step % world_size or not 0 <= rank < world_size or depth < 1:
            raise ValueError(f"{sequences_per_step} sequences, rank {rank} of {world_size}, depth {depth}")
        self.wait_seconds = 0.0
        self._mixture = mixture
        self._sequences_per_step = sequences_per_step
        self._slice = sequences_per_step // world_size
        self._offset = rank * self._slice
        self._depth = depth
        self._start = mixture.next_sample
        self._taken = 0
        self._ready: deque[Batch] = deque()
        self._error: BaseException | None = None
        self._closed = False
        # The condition guards the queue; the lock guards the mixture, so that taking never waits for dealing.
        self._condition = threading.Condition()
        self._mixture_lock = threading.Lock()
        self._thread = threading.Thread(target=self._deal_ahead, name="prefetch", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    @property
    def next_sample(self) -> int:
        """First global sample of the step that `next` returns next."""
        return self._start + self._taken * self._sequences_per_step

    @property
    def weights(self) -> dict[str, float]:
        """The weights announced last."""
        # Without the lock, which is held while rows are read: the thread that announces weights is the one that asks.
        return self._mixture.weights

    @property
    def weights_taken(self) -> dict[str, float]:
        """The weights that the last step taken was dealt by."""
        return self._mixture.weights_at(self.next_sample - self._sequences_per_step)

    def next(self) -> Batch:
        """Take this rank's slice of the next step; `wait_seconds` grows by the time spent waiting for it.

        Raises:
            RuntimeError: the prefetcher was closed.
        """
        started = time.perf_counter()
        with self._condition:
            self._condition.wait_for(lambda: self._ready or self._error or self._closed)
            self.wait_seconds += time.perf_counter() - started
            if self._closed:
                raise RuntimeError("the prefetcher is closed")
            if self._ready:
                self._taken += 1
                self._condition.notify_all()
                return self._ready.popleft()
            assert self._error is not None
            raise self._error

    def update_weights(self, weights: Mapping[str, float]) -> int:
        """Announce weights for the first step that cannot have been dealt yet; returns its first sample."""
        first_sample = self.next_sample + self._depth * self._sequences_per_step
        with self._mixture_lock:
            self._mixture.update_weights(weights, first_sample=first_sample)
        return first_sample

    def samples_per_domain(self) -> dict[str, int]:
        """Samples of each domain in the steps taken, over all ranks."""
        with self._mixture_lock:
            return self._mixture.samples_per_domain(next_sample=self.next_sample)

    def state_dict(self) -> dict[str, Any]:
        """State of the mixture after the steps taken; `Mixture.load_state_dict` reads it."""
        with self._mixture_lock:
            return self._mixture.state_dict(next_sample=self.next_sample)

    def close(self) -> None:
        """Stop the thread; batches dealt ahead are dropped."""
        with self._condition:
            self._closed = True
            self._condition.notify_all()
        self._thread.join()
        self._ready.clear()

    def _deal_ahead(self) -> None:
        first_sample = self._start + self._offset
        try:
            while True:
                with self._condition:
                    self._condition.wait_for(lambda: self._closed or len(self._ready) < self._depth)
                    if self._closed:
                        return
                with self._mixture_lock:
                    num_labels = self._mixture.num_labels(
                        first_sample=first_sample - self._offset, num_sequences=self._sequences_per_step
                    )
                    batch = self._mixture.batch(first_sample=first_sample, num_sequences=self._slice)
                batch = dataclasses.replace(batch, num_labels=num_labels)
                first_sample += self._sequences_per_step
                with self._condition:
                    self._ready.append(batch)
                    self._condition.notify_all()
        except BaseException as error:  # noqa: BLE001  `next` raises it in the thread that asks
            with self._condition:
                self._error = error
                self._condition.notify_all()
