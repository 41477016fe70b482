"""Backends, the owners of kernels: a file each, chosen by :func:`mptrain.precision.backends.base.resolve`."""
