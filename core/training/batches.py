"""Put the training pictures into order and batches."""

import random
from collections.abc import Sequence

from .encode import EncodedImage


class Batches:
    """The pictures of each forward pass. They depend only on the seed and the pass number, so no state has to be saved.

    An epoch contains every picture `repeats` times, in batches of one latent shape each. A batch that would be too small is
    filled up from the start of its bucket.
    """

    def __init__(self, images: Sequence[EncodedImage], batch_size: int, seed: int):
        self.seed = seed
        self.batch_size = batch_size
        self.buckets: dict[tuple[int, ...], list[int]] = {}
        for index, image in enumerate(images):
            self.buckets.setdefault(tuple(image.mean.shape), []).extend([index] * image.repeats)
        self.per_epoch: int = sum(-(-len(indices) // batch_size) for indices in self.buckets.values())
        self._epoch, self._order = -1, []

    def at(self, number: int) -> list[int]:
        """Return the indices of the `batch_size` pictures in forward pass `number`, counted from 0."""
        epoch, position = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            self._epoch, self._order = epoch, self._shuffled(epoch)
        return self._order[position]

    def _shuffled(self, epoch: int) -> list[list[int]]:
        order = random.Random(f"{self.seed}/{epoch}")
        batches = []
        for indices in self.buckets.values():
            indices = order.sample(indices, len(indices))
            while len(indices) % self.batch_size:
                indices += indices[: self.batch_size - len(indices) % self.batch_size]
            batches += [indices[i : i + self.batch_size] for i in range(0, len(indices), self.batch_size)]
        order.shuffle(batches)
        return batches
