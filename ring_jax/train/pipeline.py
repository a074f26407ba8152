"""A stage of work that hands on what it makes, in a thread of its own or not.

items, ended = stage(produce, ahead=True)     produce(emit) runs in a thread; items come as they are emitted
items, ended = stage(produce, ahead=False)    it has run to its end before the first item is seen
for item in items: ...
ended()                                       what `produce` returned
"""

import queue
from collections.abc import Callable, Iterable, Iterator
from concurrent import futures
from typing import TypeVar

Item, Result = TypeVar("Item"), TypeVar("Result")

_END = object()


def stage(
  produce: Callable[[Callable[[Item], None]], Result], *, ahead: bool
) -> tuple[Iterable[Item], Callable[[], Result]]:
  """An error of `produce` is raised where its items are read, and by `ended`."""
  if not ahead:
    items: list[Item] = []
    result = produce(items.append)
    return items, lambda: result
  waiting: queue.SimpleQueue = queue.SimpleQueue()
  pool = futures.ThreadPoolExecutor(1, "stage")
  future = pool.submit(produce, waiting.put)
  future.add_done_callback(lambda _: waiting.put(_END))
  pool.shutdown(wait=False)
  return _until_end(waiting, future), future.result


def _until_end(waiting: queue.SimpleQueue, future: futures.Future) -> Iterator[Item]:
  while (item := waiting.get()) is not _END:
    yield item
  future.result()
