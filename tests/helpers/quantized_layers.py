"""Layers to quantize."""

import torch
from torch import nn


def layers(n_in=256, n_out=256, bias=True):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(n_in, n_out, bias), nn.Tanh(), nn.Linear(n_out, n_out, bias)).eval()
