"""The C++ CPU kernels of both engines: their source, their build at first use, and its cache."""


class BuildError(Exception):
    """No library can be built or loaded on this machine; the message says why."""
