"""This process's place in its session, and what it needs to take part.

loop       one thread at a time does all of the process's socket I/O: whoever waits
session    the folder, the secret, the agents; made at first use, gone at the end
endpoint   where other processes of the session connect to this one
agents     the parent's side of an agent: starts processes through it and hears how they end
agent      the program of a job: a warm template that forks processes on request
child      what a started process does before the user's code and after it
main       how the user's `__main__` comes to be in another process
poller     waits for sockets, with a little patience before sleeping
logs       what Fiber logs, as the configuration asks for it
signals    keeps a Ctrl-C out of code that must not stop half-way
"""
