"""Small models with weights that matter, and the folders of runs that would have trained them."""

import dataclasses
import json
import sysconfig
from pathlib import Path

import torch

from mptrain import models
from mptrain.checkpoint.checkpoints import Checkpoints

CORPUS = Path(sysconfig.get_path("stdlib")) / "asyncio"
VOCAB, BLOCK = 256, 32
SIZES = {
    "gpt": {"vocab_size": VOCAB, "block_size": BLOCK, "n_layer": 2, "n_head": 4, "n_embd": 64},
    "llama": {"vocab_size": VOCAB, "block_size": BLOCK, "n_layer": 2, "n_head": 4, "n_embd": 64},
    "vit": {"image_size": 8, "channels": 1, "classes": 10, "n_layer": 2, "n_head": 4, "n_embd": 64},
}
DATA = {"tokens": {"kind": "stdlib", "root": str(CORPUS)}, "images": {"kind": "digits"}}
FROM_DATA = ("vocab_size", "image_size", "channels", "classes")


def small(kind="gpt", **settings):
    """Away from the first weights, so that biases and norms differ from zeros and ones. In eval mode."""
    module = models.load(kind)
    torch.manual_seed(0)
    model = module.build(module.Config(**SIZES[kind] | settings))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def inputs(model):
    torch.manual_seed(1)
    batch = model.example(4 * BLOCK)
    batch.pop("targets", None)
    batch.pop("labels", None)
    return batch


def run_of(folder, model, kind="gpt", steps=(3,), **parts):
    """A run's folder: its settings as train.py writes them (without what the data decides), and its checkpoints."""
    folder.mkdir(parents=True)
    sizes = dataclasses.asdict(model.config)
    settings = {
        "model": {"kind": kind, **sizes, **{name: 0 for name in FROM_DATA if name in sizes}},
        "data": DATA[models.load(kind).INPUT],
    }
    (folder / "config.json").write_text(json.dumps(settings))
    for step in steps:
        Checkpoints(folder / "checkpoints", keep=9).save(step, {"model": model, **parts}, {})
    return folder
