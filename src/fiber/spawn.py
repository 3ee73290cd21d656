"""`multiprocessing.spawn` itself, for programs that reach for it by Fiber's name."""

import sys
from multiprocessing import spawn

sys.modules[__name__] = spawn
