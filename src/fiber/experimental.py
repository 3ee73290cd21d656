"""`Ring` by the name that it had in Uber's Fiber."""

from fiber.ring import Ring, RingNode

__all__ = ["Ring", "RingNode"]
