"""`multiprocessing.resource_sharer` itself, for programs that reach for it by Fiber's name."""

import sys
from multiprocessing import resource_sharer

sys.modules[__name__] = resource_sharer
