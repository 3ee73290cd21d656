"""`multiprocessing.reduction` itself, for programs that reach for it by Fiber's name."""

import sys
from multiprocessing import reduction

sys.modules[__name__] = reduction
