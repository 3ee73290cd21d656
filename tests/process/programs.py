"""A program that uses functions and classes of `__main__` in all the ways there are.

It must run the same however it is started; it prints "all is well".
"""

from __future__ import annotations

import subprocess

DEFINITIONS = """
import fiber, functools

OFFSET = 10

def helper(number):
    return number + OFFSET

def shift(number):
    return helper(number)

def add(one, other):
    return one + other

class Point:
    class Colour:
        def __init__(self, name):
            self.name = name

    def __init__(self, x):
        self.x = x
        self.colour = Point.Colour("red")

    def moved(self, step):
        return type(self)(self.x + step)

    def save(self, path):
        with open(path, "w") as file:
            file.write(f"{type(self).__name__} {self.x} {self.colour.name}")

def mirror(point):
    assert isinstance(point, Point) and isinstance(point.colour, Point.Colour), type(point)
    return Point(-point.x)

class Trouble(Exception):
    pass

def trouble(number):
    raise Trouble(number)

class Writer(fiber.Process):
    def __init__(self, point):
        super().__init__()
        self.point = point

    def run(self):
        assert isinstance(self.point, Point)
        self.point.save("subclass")

def make_adder(step):
    def adder(number):
        return number + step
    return adder
"""

ACTIONS = """
def run(target, *args):
    process = fiber.Process(target=target, args=args)
    process.start()
    process.join()
    assert process.exitcode == 0, process.exitcode

def read(path):
    with open(path) as file:
        return file.read()

run(Point(1).save, "method")
assert read("method") == "Point 1 red", read("method")
run(lambda: Point(2).save("lambda"))
assert read("lambda") == "Point 2 red"
run(functools.partial(Point.save, Point(3)), "partial")
assert read("partial") == "Point 3 red"
run(Point.save, Point(4), "function")
assert read("function") == "Point 4 red"
process = Writer(Point(5)); process.start(); process.join()
assert process.exitcode == 0
assert read("subclass") == "Point 5 red"
pool = fiber.Pool(2)
assert pool.map(shift, range(3)) == [10, 11, 12]
assert pool.map(make_adder(5), range(3)) == [5, 6, 7]
assert pool.map(lambda number: helper(number) * 2, range(3)) == [20, 22, 24]
assert pool.map(functools.partial(add, other=1), range(3)) == [1, 2, 3]
assert pool.map(Point(7).moved, [1])[0].x == 8
points = pool.map(mirror, [Point(1), Point(2)])
assert [point.x for point in points] == [-1, -2]
assert all(isinstance(point, Point) for point in points), [type(point) for point in points]
assert all(isinstance(point.colour, Point.Colour) for point in points)
assert all(type(point) is Point for point in pool.map(Point, range(5)))
assert all(type(point) is Point for point in pool.imap_unordered(Point, range(5)))
assert type(pool.apply(Point, (1,))) is Point
try:
    pool.apply(trouble, (3,))
except Trouble as error:
    assert error.args == (3,)
else:
    raise AssertionError("no exception")
pool.close()
pool.join()
print("all is well")
"""

GUARD = 'if __name__ == "__main__":\n'


def indented(text: str) -> str:
    return "".join("    " + line if line.strip() else line for line in text.splitlines(True))


GUARDED = DEFINITIONS + GUARD + indented(ACTIONS)
UNGUARDED = DEFINITIONS + ACTIONS
UNDER_THE_GUARD = GUARD + indented(DEFINITIONS + ACTIONS)
IN_A_FUNCTION = DEFINITIONS + "def main():\n" + indented(ACTIONS) + GUARD + "    main()\n"


def well(done: subprocess.CompletedProcess[str]) -> bool:
    assert (done.stdout, done.stderr, done.returncode) == ("all is well\n", "", 0)
    return True
