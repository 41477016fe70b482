"""Owners of kernels: one file each, chosen by :func:`mptrain.backends.base.resolve` and imported only when asked."""
