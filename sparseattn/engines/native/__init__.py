"""The C++ CPU kernels of both engines: their source, their build at first use, and its cache."""
