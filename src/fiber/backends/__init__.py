"""Backends: what starts jobs. `base` is the protocol, `registry` knows the names."""
