"""`multiprocessing.dummy` itself, for programs that reach for it by Fiber's name."""

import sys
from multiprocessing import dummy

sys.modules[__name__] = dummy
