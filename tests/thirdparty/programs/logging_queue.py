"""Records of many processes reach the handlers of one, through a queue."""

import logging
import logging.handlers

import fiber


class Collect(logging.Handler):
    def __init__(self):
        super().__init__()
        self.seen = []

    def emit(self, record):
        self.seen.append((record.processName, record.getMessage()))


def work(queue, number):
    logger = logging.getLogger("work")
    logger.setLevel(logging.INFO)
    logger.addHandler(logging.handlers.QueueHandler(queue))
    for i in range(20):
        logger.info("step %d of %d", i, number)
    try:
        1 / 0  # noqa: B018
    except ZeroDivisionError:
        logger.exception("failed %d", number)


if __name__ == "__main__":
    queue = fiber.Queue()
    handler = Collect()
    listener = logging.handlers.QueueListener(queue, handler)
    listener.start()
    processes = [fiber.Process(target=work, args=(queue, n), name=f"job {n}") for n in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    listener.stop()
    print("records:", len(handler.seen))
    for n in range(3):
        mine = [text for name, text in handler.seen if name == f"job {n}"]
        steps = [f"step {i} of {n}" for i in range(20)]
        print(n, mine[:20] == steps, mine[20].splitlines()[0], mine[20].splitlines()[-1])
