"""Owners of kernels: one file each, chosen by :func:`mptrain.precision.backends.base.resolve` and imported only when asked."""
