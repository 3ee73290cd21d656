"""`multiprocessing.resource_tracker` itself, for programs that reach for it by Fiber's name."""

import sys
from multiprocessing import resource_tracker

sys.modules[__name__] = resource_tracker
