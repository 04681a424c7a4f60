"""Shoal beside other engines: `python -m bench.peers`."""
