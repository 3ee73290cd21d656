"""What the home of an object does for it: locks, barriers, queues as state within the loop.

Each class is a `fiber.runtime.home.Served`; what users hold is in `fiber.synchronize` and
`fiber.queues`.
"""
