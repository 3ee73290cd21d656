"""Code: how Fiber and the program reach a machine that has neither.

bootstrap  what a job runs first: it gets Fiber itself from the master
bundle     Fiber in one piece, with its compiled code
project    at the master: the modules that are the program's own
finder     at the worker: imports these modules from the master
packages   third-party packages come from the image; says which it lacks
server     at the master: answers what the others ask
protocol   what they ask and are answered

bootstrap ── BUNDLE ──► server ── bundle            the connection is the same, one after the other
finder    ── MODULE ──► server ── project
"""
