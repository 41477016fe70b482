"""A model, data and a sink small enough to train in a test."""

import numpy as np
import torch

from mptrain.loggers import NullSink
from mptrain.models import gpt

SIZES = gpt.Config(vocab_size=16, block_size=8, n_layer=1, n_head=2, n_embd=16)


class Data:
    """Eight samples a step, cut into micro-batches; validation is other text."""

    def samples(self, seed, count):
        raw = np.random.Philox(key=[7, seed]).random_raw(count * 9) % np.uint64(16)
        text = torch.from_numpy(raw.astype(np.int64)).view(count, 9) // 2 * 2
        return {"tokens": text[:, :-1], "targets": text[:, 1:]}

    def batch(self, step, *, micro, microbatches, batch_size, seed, rank=0, world_size=1):
        every = self.samples(step, 8)
        return {name: part[micro * batch_size : (micro + 1) * batch_size] for name, part in every.items()}

    def validation(self, batch_size, batches):
        for index in range(batches):
            yield self.samples(1000 + index, batch_size)


class Kept(NullSink):
    def __init__(self):
        self.rows, self.events, self.records = [], [], []

    def metrics(self, step, values):
        self.rows.append((step, values))

    def event(self, event):
        self.events.append(event)

    def record(self, record):
        self.records.append(record)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])
