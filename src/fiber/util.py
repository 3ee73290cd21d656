"""`multiprocessing.util` itself, for programs that reach for it by Fiber's name."""

import sys
from multiprocessing import util

sys.modules[__name__] = util
