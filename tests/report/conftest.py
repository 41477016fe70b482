from inspected import inspect, refused, run  # noqa: F401 - fixtures
