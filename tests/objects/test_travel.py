"""Objects are the same objects wherever they are pickled to, and whoever made them."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tests.objects import actors
from tests.objects.actors import leave_mark, make_all, see_mark

import fiber

DEADLINE = 20.0


@pytest.fixture
def objects() -> Iterator[dict[str, Any]]:
    made = make_all()
    yield made
    made.clear()


@pytest.fixture
def run(start: Callable[..., Any], ends_well: Callable[..., None]) -> Callable[..., None]:
    """Run a function in a process, to its end."""
    return lambda *args, **kwargs: ends_well(start(*args, **kwargs))


@pytest.fixture
def pool() -> Iterator[Any]:
    with fiber.Pool(1) as pool:
        yield pool


def test_as_argument(objects: dict[str, Any], run: Callable[..., None]) -> None:
    run(leave_mark, objects)
    see_mark(objects)


def test_as_keyword_argument(objects: dict[str, Any], run: Callable[..., None]) -> None:
    run(leave_mark, objects=objects)
    see_mark(objects)


def test_in_a_closure(objects: dict[str, Any], run: Callable[..., None]) -> None:
    run(lambda: leave_mark(objects))
    see_mark(objects)


def test_in_a_partial(objects: dict[str, Any], run: Callable[..., None]) -> None:
    run(functools.partial(leave_mark, objects))
    see_mark(objects)


def test_as_attribute_of_a_process(objects: dict[str, Any], ends_well: Callable[..., None]) -> None:
    process = actors.Marker(objects)
    process.start()
    ends_well(process)
    see_mark(objects)


def test_as_bound_method(run: Callable[..., None]) -> None:
    q, event, lock = fiber.Queue(), fiber.Event(), fiber.Lock()
    run(q.put, "item")
    run(event.set)
    run(lock.acquire)
    assert q.get(timeout=DEADLINE) == "item"
    assert event.is_set()
    assert not lock.acquire(False)


def test_as_argument_of_a_task(objects: dict[str, Any], pool: Any) -> None:
    pool.apply(leave_mark, (objects,))
    see_mark(objects)


@pytest.mark.parametrize("how", ["map", "starmap", "imap", "imap_unordered", "map_async"])
def test_in_items_of_a_pool(how: str, pool: Any) -> None:
    all_of_them = [make_all() for _ in range(3)]
    items = [(objects,) for objects in all_of_them] if how == "starmap" else all_of_them
    results = getattr(pool, how)(leave_mark, items)
    for _ in results.get(DEADLINE) if how == "map_async" else results:
        pass
    for objects in all_of_them:
        see_mark(objects)


def test_in_a_pool_s_initializer(objects: dict[str, Any]) -> None:
    with fiber.Pool(1, initializer=leave_mark, initargs=(objects,)) as pool:
        pool.apply(abs, (1,))
        see_mark(objects)


def test_in_a_task_s_closure(objects: dict[str, Any], pool: Any) -> None:
    assert pool.map(lambda sign: leave_mark(objects, sign), ["mine"]) == [None]
    see_mark(objects, "mine")


@pytest.mark.parametrize("kind", ["Queue", "Queue of 3", "JoinableQueue", "SimpleQueue"])
def test_through_a_queue(kind: str, objects: dict[str, Any], start: Callable[..., Any]) -> None:
    way = actors.KINDS[kind]()
    process = start(actors.mark_what_comes, way)
    way.put(objects)
    way.put([[objects["Lock"]], {"a": objects["Queue"]}])
    process.join()
    assert process.exitcode == 0
    see_mark(objects)


def test_a_queue_through_itself() -> None:
    q = fiber.Queue()
    q.put(q)
    other = q.get(timeout=DEADLINE)
    other.put("item")
    assert q.get(timeout=DEADLINE) == "item"


def test_to_a_grandchild(objects: dict[str, Any], run: Callable[..., None]) -> None:
    run(actors.descend, 2, objects)
    see_mark(objects)


def test_from_sibling_to_sibling(objects: dict[str, Any], start: Callable[..., Any]) -> None:
    way, on = fiber.Queue(), fiber.Queue()
    processes = [start(actors.pass_on, way, on), start(actors.mark_what_comes, on)]
    way.put(objects)
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    see_mark(objects)


def test_bytes_of_a_pickle(objects: dict[str, Any], run: Callable[..., None]) -> None:
    run(actors.mark_pickled, pickle.dumps(objects))
    see_mark(objects)


def test_a_condition_shares_its_lock(start: Callable[..., Any], run: Callable[..., None]) -> None:
    lock = fiber.Lock()
    first, second = fiber.Condition(lock), fiber.Condition(lock)
    ready, woken = fiber.Semaphore(0), fiber.Queue()
    start(actors.wait_in, first, ready, woken)
    start(actors.wait_in, second, ready, woken, 0.5)
    for _ in range(2):
        assert ready.acquire(timeout=DEADLINE)
    run(leave_mark, {"Lock": lock})
    assert not first.acquire(False)
    assert not second.acquire(False)
    lock.release()
    with second:
        second.notify_all()  # this condition's alone
    assert woken.get(timeout=DEADLINE) is True
    assert woken.empty()
    with first:
        first.notify()
    assert woken.get(timeout=DEADLINE) is True


# Made elsewhere --------------------------------------------------------------------------------


def test_made_in_a_child(start: Callable[..., Any], ends_well: Callable[..., None]) -> None:
    """The parent marks them, the child sees it; the parent sees what the child marks."""
    out, marked = fiber.Queue(), fiber.Event()
    process = start(actors.make_and_look, out, marked)
    theirs, ours = out.get(timeout=DEADLINE), out.get(timeout=DEADLINE)
    leave_mark(theirs)
    see_mark(ours)
    marked.set()
    ends_well(process)


def test_made_in_a_child_for_its_sibling(
    start: Callable[..., Any], ends_well: Callable[..., None]
) -> None:
    out, marked, on, done = fiber.Queue(), fiber.Event(), fiber.Queue(), fiber.Event()
    maker = start(actors.make_and_look, out, marked)
    sibling = start(actors.mark_and_tell, on, done)
    on.put(out.get(timeout=DEADLINE))
    assert done.wait(DEADLINE)
    marked.set()
    ends_well(maker, sibling)
    del out


def test_results_of_a_pool(pool: Any) -> None:
    for objects in (pool.apply(make_all), pool.map(actors.make_anew, range(3))[1]):
        leave_mark(objects, "by us")
        pool.apply(see_mark, (objects, "by us"))


def test_a_pool_s_queue_between_its_workers() -> None:
    """Made in one worker, used by others, handed over by the master."""
    with fiber.Pool(2) as pool:
        q = pool.apply(fiber.Queue)
        assert pool.map(q.put, range(50)) == [None] * 50
        assert sorted(pool.map(actors.get_one, [q] * 50)) == list(range(50))


def test_the_maker_is_gone(start: Callable[..., Any], ends_well: Callable[..., None]) -> None:
    out, marked = fiber.Queue(), fiber.Event()
    process = start(actors.make_and_look, out, marked)
    theirs, ours = out.get(timeout=DEADLINE), out.get(timeout=DEADLINE)
    leave_mark(theirs)
    marked.set()
    ends_well(process)
    for kind, obj in ours.items():
        use = {
            "Event": lambda obj: obj.wait(),
            "Barrier": lambda obj: obj.wait(),
        }.get(kind, lambda obj: obj.get() if hasattr(obj, "get") else obj.acquire())
        with pytest.raises(fiber.PeerDied, match="process"):
            use(obj)
        repr(obj)
        pickle.dumps(obj)
    out.put("and nothing else is broken")
    assert out.get(timeout=DEADLINE) == "and nothing else is broken"


# Forks of the user -----------------------------------------------------------------------------

FORK = """
import os, sys, time
sys.path.insert(0, {root!r})
import fiber
from tests.objects.actors import leave_mark, make_all, see_mark

def fork(work, *args, leave=os._exit):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            work(*args)
            code = 0
        finally:
            leave(code)
    return pid

def well(pid):
    assert os.waitpid(pid, 0)[1] == 0, "the forked process failed"

def main():
    {body}

if __name__ == "__main__":
    main()
    print("all is well")
"""


@pytest.fixture
def forking(run_script: Callable[..., Any], request: pytest.FixtureRequest) -> Any:
    def run(body: str) -> None:
        root = str(request.config.rootpath)
        lines = "\n    ".join(body.strip().splitlines())
        done = run_script(FORK.format(root=root, body=lines), timeout=40)
        assert (done.stdout, done.returncode) == ("all is well\n", 0), done.stderr

    return run


@pytest.mark.parametrize("leave", ["os._exit", "sys.exit"])
def test_in_a_fork(leave: str, forking: Callable[[str], None]) -> None:
    forking(f"""
objects = make_all()
if {leave} is os._exit:  # its end is not known to be an end as it should be
    objects = {{kind: obj for kind, obj in objects.items() if not hasattr(obj, "acquire")}}
well(fork(leave_mark, objects, leave={leave}))
see_mark(objects)
""")


@pytest.mark.parametrize("by", ["master", "child"])
def test_a_fork_that_uses_objects_of_its_parents_makes_no_folder(
    by: str, forking: Callable[[str], None]
) -> None:
    """Else one that ends by os._exit would leave it behind."""
    forking(f"""
import glob, tempfile
def use(q, out):
    assert [q.get(timeout=20) for _ in range(100)] == list(range(100))
    out.put("seen")
def fork_one(q, out):
    well(fork(use, q, out))
q, out = fiber.Queue(), fiber.Queue()
for number in range(100):
    q.put(number)
if {by!r} == "master":
    fork_one(q, out)
else:
    process = fiber.Process(target=fork_one, args=(q, out))
    process.start()
    process.join()
    assert process.exitcode == 0
assert out.get(timeout=20) == "seen"
folders = glob.glob(os.path.join(tempfile.gettempdir(), "fiber-*"))
assert len(folders) == 1, folders
""")


def test_in_a_fork_that_has_used_them(forking: Callable[[str], None]) -> None:
    """Nothing of what the parent had pending or held is the child's."""
    forking("""
q, back = fiber.Queue(), fiber.Queue()
rlock, lock, condition = fiber.RLock(), fiber.Lock(), fiber.Condition()
for number in range(100):
    q.put(number)
def child():
    assert [rlock.acquire(False), lock.acquire(False), condition.acquire(False)] == [False] * 3
    for call in (rlock.release, condition.notify, condition.wait):
        try:
            call()
        except AssertionError:
            pass
        else:
            raise Exception(call)
    for number in range(100, 110):
        q.put(number)
    q.close(); q.join_thread()
with rlock, lock, condition:
    well(fork(child))
    assert rlock.acquire(False)
    rlock.release()
assert sorted(q.get(timeout=5) for _ in range(110)) == list(range(110))
assert q.empty()
assert lock.acquire(False) and rlock.acquire(False) and condition.acquire(False)
""")


def test_a_fork_of_a_child_with_items_granted_ahead(forking: Callable[[str], None]) -> None:
    forking("""
q, back, told = fiber.Queue(), fiber.Queue(), fiber.Event()
for number in range(1000):
    q.put(number)
def child():
    for _ in range(200):
        back.put(q.get())
    pid = fork(take, leave=sys.exit)
    take()
    well(pid)
def take():
    try:
        while True:
            back.put(q.get(timeout=0.5))
    except Exception as error:
        assert "Empty" in repr(error), error
process = fiber.Process(target=child)
process.start()
process.join()
assert process.exitcode == 0
assert sorted(back.get(timeout=5) for _ in range(1000)) == list(range(1000))
assert back.empty() and q.empty()
""")


def test_what_a_fork_puts_at_its_end(forking: Callable[[str], None]) -> None:
    """The last of a burst is kept back for others to go with it: it is sent nevertheless."""
    forking("""
q, other = fiber.Queue(), fiber.Queue()
def work(me):
    for number in range(50):
        q.put((me, number))
        other.put((me, number))
for me in range(10):
    well(fork(work, me, leave=sys.exit))
for each in (q, other):
    got = [each.get(timeout=5) for _ in range(500)]
    assert got == [(me, number) for me in range(10) for number in range(50)]
""")


def test_forks_and_their_parent_share_the_work(forking: Callable[[str], None]) -> None:
    forking("""
q, back, lock = fiber.Queue(), fiber.Queue(), fiber.Lock()
def work():
    while True:
        with lock:
            item = q.get()
        if item is None:
            break
        back.put(item)
pids = [fork(work, leave=sys.exit) for _ in range(4)]
for number in range(400):
    q.put(number)
for _ in pids:
    q.put(None)
for pid in pids:
    well(pid)
assert sorted(back.get(timeout=5) for _ in range(400)) == list(range(400))
""")
