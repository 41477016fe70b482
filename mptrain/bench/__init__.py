"""Benchmarks against targets, peers and limits, each with a command of its own."""
