"""Many workers as one: the same answers as one engine gives, and what becomes of a worker that is not to be believed."""

import asyncio
import dataclasses
import queue
import socket
import threading
from concurrent import futures

import grpc
import pytest

from configs.schema import KVPolicy
from ring_jax.records import FinishReason
from rollout.engine import RingEngine
from rollout.remote import wire
from rollout.remote import worker_pb2 as pb
from rollout.remote.client import RemoteWorker, WorkerLost
from rollout.remote.pool import WorkerPool
from rollout.remote.server import add_rl_service, serve
from rollout.remote.shared import SharedPool
from rollout.service import EngineService, Request
from rollout.worker import EngineWorker, Events, Job
from sharding import processes
from tests.rollout.remote_cases import (
  CONFIG,
  ENGINE,
  EOS,
  IMPATIENT,
  MASK,
  MODEL,
  TOKEN,
  answers,
  packed_versions,
  pool_of,
  same,
  started,
  wait_until,
)


@pytest.fixture(scope="module")
def versions():
  return packed_versions()


@pytest.fixture
def worker():
  with started() as found:
    yield found


def test_two_workers_draw_what_one_engine_of_this_process_does(versions):
  expected, _ = answers(EngineWorker(ENGINE), versions)
  with started() as (_, one), started() as (_, other), pool_of(one, other) as pool:
    wait_until_both(pool, versions)
    found, scheduler = answers(pool, versions)
    assert len(pool.slots) == 8 and pool.workers == sorted(f"127.0.0.1:{port}" for port in (one, other))
  same(expected, found)
  assert {rollout.finish_reason for rollout in found.values()} == {FinishReason.STOP, FinishReason.LENGTH}
  assert scheduler.totals.redispatched == 0


# ---------------------------------------------------------------------------------------------------------------------
# What a trainer believes


@pytest.mark.parametrize(
  ("change", "text"),
  [
    ({"id": 7}, "never sent"),
    ({"uid": 4}, "answers for uid 4, not 3"),
    ({"tokens": [11, 12, MODEL.vocab_size]}, "the vocabulary has"),
    ({"logps": [-1.0]}, "2 tokens, but 1 log-probs"),
    ({"logps": [-1.0, float("nan")]}, "a log-prob that is none"),
    ({"logps": [-1.0, 0.5]}, "a log-prob that is none"),
    ({"logps": [-1.0, float("-inf")]}, "a log-prob that is none"),
    ({"tokens": [11] * 6, "logps": [-1.0] * 6}, "6 tokens, 5 were asked for"),
    ({"state": pb.LENGTH}, "2 tokens, 5 were asked for"),
    ({"state": pb.STOP, "tokens": [], "logps": []}, "ended without a token"),
    ({"state": pb.ABORTED, "error": "the engine failed: out of memory"}, "gave up: the engine failed"),
    ({"state": 77}, "state 77 is none"),
    ({"version": 1}, "version 1, from 2 to 2"),
    ({"version": 3}, "version 3, from 2 to 2"),
  ],
  ids=str,
)
def test_an_answer_that_cannot_be_is_the_worker_s_end(change, text):
  worker = RemoteWorker("127.0.0.1:1", "", MODEL.vocab_size, on_message=lambda *_: None)
  worker.version = worker._given = 2
  good = {"id": 0, "uid": 3, "tokens": [11, 12], "logps": [-1.0, -0.5], "version": 2}
  try:
    worker.submit([Job(9, 3, [11], 5)])
    bad = pb.Progress(**good | change)
    if len(bad.tokens) != len(bad.logps) and "log-probs" not in text:
      bad.logps[:] = [-1.0] * len(bad.tokens)
    with pytest.raises(WorkerLost, match=text):
      worker.take(pb.FromWorker(progress=[bad]))
  finally:
    worker.close()


def test_answers_are_taken_up_to_their_end_and_not_beyond():
  worker = RemoteWorker("127.0.0.1:1", "", MODEL.vocab_size, on_message=lambda *_: None)
  worker.version = worker._given = 2
  say = lambda id, **what: worker.take(  # noqa: E731
    pb.FromWorker(progress=[pb.Progress(**{"id": id, "uid": 3, "tokens": [11], "logps": [-1.0], "version": 2} | what)])
  )
  try:
    worker.submit([Job(9, 3, [11], 5), Job(8, 3, [11], 1)])
    assert worker.running == {9: 3, 8: 3}
    assert say(1, state=pb.LENGTH).drawn[0].reason is FinishReason.LENGTH and worker.running == {9: 3}
    assert say(0).drawn[0][:3] == (9, 3, [11])
    worker._given = 3
    assert say(0, version=3).drawn[0].version == 3
    with pytest.raises(WorkerLost, match="version 2, from 3 to 3"):
      say(0, version=2)
    worker.abort([9])
    assert say(0) == Events() and not worker.running  # given up before the worker knew
    worker.submit([Job(9, 4, [11], 5)])
    assert say(2, uid=4, state=pb.REFUSED, tokens=[], logps=[]).evicted == [9] and not worker.running
  finally:
    worker.close()


def test_a_worker_that_lies_is_dropped_and_its_rollouts_go_on(versions, caplog):
  expected, _ = answers(EngineWorker(ENGINE), versions)
  with started() as (liar, bad), started() as (_, good):
    submit, told = liar.submit, []

    def lie(request, listener):
      def twisted(update):
        told.append(update)
        strange = [MODEL.vocab_size] * len(update.tokens)
        listener(dataclasses.replace(update, tokens=strange) if len(told) > 9 else update)

      return submit(request, twisted)

    liar.submit = lie
    with pool_of(bad, good) as pool:
      wait_until_both(pool, versions)
      found, scheduler = answers(pool, versions)
      assert f"127.0.0.1:{bad} is lost (job" in caplog.text and "the vocabulary has" in caplog.text
  assert scheduler.totals.redispatched >= 1 and scheduler.totals.aborted == 0
  assert {uid: rollout.tokens for uid, rollout in found.items()} == {uid: one.tokens for uid, one in expected.items()}


def wait_until_both(pool, versions):
  pool.begin(versions[0], 0, [])
  wait_until(lambda: (pool.advance([]), len(pool.workers) == 2)[1])


@pytest.mark.parametrize("silent", ["health", "engine"])
def test_a_worker_that_hangs_is_dropped(versions, silent, caplog):
  expected, _ = answers(EngineWorker(ENGINE), versions)
  patience = dataclasses.replace(IMPATIENT, call=2 if silent == "health" else 20, stall=2, retry=60)
  with started() as (hung, bad), started() as (_, good):
    go, advance = threading.Event(), hung._worker.advance
    if silent == "engine":
      hung._worker.advance = lambda jobs: (go.wait(60), advance(jobs))[1]
    pool = WorkerPool([f"127.0.0.1:{port}" for port in (bad, good)], ENGINE, token=TOKEN, patience=patience)
    try:
      wait_until_both(pool, versions)
      if silent == "health":
        stats = hung.stats
        hung.stats = lambda: (go.wait(60), stats())[1]
        hung._worker.advance = lambda jobs: (go.wait(60), advance(jobs))[1]
      found, scheduler = answers(pool, versions)
    finally:
      go.set()
      pool.close()
  says = "DEADLINE_EXCEEDED" if silent == "health" else "nothing came of"
  assert says in caplog.text and scheduler.totals.redispatched >= 1
  assert {uid: rollout.tokens for uid, rollout in found.items()} == {uid: one.tokens for uid, one in expected.items()}


def test_a_worker_of_another_config_is_refused(worker, versions, caplog):
  other = RingEngine(MODEL, dataclasses.replace(CONFIG, temperature=0.5), eos_ids=(7,), vocab_mask_V=MASK, seed=2)
  with pool_of(worker[1], engine=other) as pool:
    wait_until(lambda: "does not join" in caplog.text)
    assert not pool.slots
  assert "was started with another config: eos_ids, sampling differ" in caplog.text


def test_slots_and_layout_are_the_worker_s_own(versions):
  expected, _ = answers(EngineWorker(ENGINE), versions)
  other = dataclasses.replace(CONFIG, slots=2, steps_per_dispatch=3, prefill_batch=4, page_size=16)
  with started(RingEngine(MODEL, other, eos_ids=EOS, vocab_mask_V=MASK, seed=1)) as (_, port), pool_of(port) as pool:
    found, _ = answers(pool, versions)
    assert len(pool.slots) == 2
  same(expected, found)


def test_a_length_that_pages_do_not_hold_is_no_worker_s_own():
  """Its rollouts would end earlier, and what others began might not fit at all."""

  def length(**changes):
    config = dataclasses.replace(CONFIG, **changes)
    return RingEngine(MODEL, config, eos_ids=EOS, vocab_mask_V=MASK, seed=1).settings()["length"]

  assert length(page_size=8) == length(page_size=8, pages=8) == length() != length(page_size=8, pages=6)


def test_a_worker_that_is_lost_before_it_has_slots_gets_none(versions):
  with started() as (_, port), pool_of(port) as pool:
    pool.begin(versions[0], 0, [])
    wait_until(lambda: not pool._joining.empty())
    first = pool._connections[f"127.0.0.1:{port}"]
  # The trainer was busy meanwhile; the pool is closed, and so is the connection.
  wait_until(lambda: first.is_lost)
  for _ in range(3):
    pool.advance([])
  assert not pool.slots


def test_a_full_queue_gives_the_slot_back(versions):
  service = EngineService(EngineWorker(ENGINE), None, -1, max_waiting=0)
  server, port = serve(service, token=TOKEN)
  try:
    with pool_of(port) as pool:
      pool.begin(versions[0], 0, [])
      wait_until(lambda: (pool.advance([]), len(pool.slots) == 4)[1])
      service.pause()
      other = [service.submit(request_of(i), lambda update: None) for i in range(3)]  # another front's
      seen = pool.advance([Job(slot, slot, [11, 12], 3) for slot in pool.slots])
      while len(seen.evicted) < 3:
        seen.evicted += pool.advance([]).evicted
      assert len(set(seen.evicted)) == 3
      for number in other:
        service.abort(number)
  finally:
    server.stop(grace=None).wait()
    service.close()


def request_of(uid):
  return Request([11, 12], 3, uid)


# ---------------------------------------------------------------------------------------------------------------------
# Keys and values that are kept


def test_kept_keys_and_values_decode_on_under_new_weights(versions):
  config = dataclasses.replace(CONFIG, kv_policy=KVPolicy.KEEP)
  engine = RingEngine(MODEL, config, eos_ids=(), vocab_mask_V=MASK, seed=1)
  with started(engine) as (_, port), pool_of(port, engine=engine) as pool:
    pool.begin(versions[0], 0, [])
    wait_until(lambda: (pool.advance([]), len(pool.slots) == 4)[1])
    jobs = [Job(slot, 20 + slot, [11, 12, 13 + slot], 50) for slot in sorted(pool.slots)]
    drawn = pool.advance(jobs[:3]).drawn
    while not any(one.slot == jobs[0].slot for one in drawn):
      drawn += pool.advance([]).drawn
    # The third is given up; the fourth is said to run, and does not: as after a restart of the trainer.
    pool.begin(versions[1], 1, [jobs[0], jobs[1], jobs[3]])
    wait_until(lambda: drawn.extend(pool.advance([]).drawn) or sum(one.reason is not None for one in drawn) == 3)
  for job in (jobs[0], jobs[1], jobs[3]):
    own = [one for one in drawn if one.slot == job.slot]
    before = sum(len(one.tokens) for one in own if one.version == 0)
    assert [one.version for one in own] == sorted(one.version for one in own)
    assert (before > 0) == (job is not jobs[3]) and sum(len(one.tokens) for one in own) == 50
    local, again = EngineWorker(engine), []
    local.begin(versions[0] if before else versions[1], 0, [])
    while sum(len(one.tokens) for one in again) < 50:
      again += local.advance([] if again else [job]).drawn
      if sum(len(one.tokens) for one in again) == before:
        local.load(versions[1], 1)
    assert [token for one in again for token in one.tokens] == [token for one in own for token in one.tokens]


# ---------------------------------------------------------------------------------------------------------------------
# Where it stands, and how it is found


def test_the_service_stands_on_an_asyncio_server_too(versions):
  expected, _ = answers(EngineWorker(ENGINE), versions, limit=2)
  service, ports = EngineService(EngineWorker(ENGINE), None, -1, max_waiting=16), queue.SimpleQueue()
  loop = asyncio.new_event_loop()

  async def run():
    server = grpc.aio.server(
      migration_thread_pool=futures.ThreadPoolExecutor(8), options=wire.channel_options(wire.CHUNK_BYTES)
    )
    add_rl_service(server, service, token=TOKEN)
    ports.put((server.add_insecure_port("127.0.0.1:0"), server))
    await server.start()

  thread = threading.Thread(target=loop.run_forever, daemon=True)
  thread.start()
  asyncio.run_coroutine_threadsafe(run(), loop).result(60)
  port, server = ports.get()
  try:
    with pool_of(port) as pool:
      found, _ = answers(pool, versions, limit=2)
    wait_until(lambda: not service.stats().running)
  finally:
    asyncio.run_coroutine_threadsafe(server.stop(None), loop).result(60)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(60)
    service.close()
  same(expected, found)


def test_a_file_of_addresses_is_read_again_and_again(worker, versions, tmp_path, caplog):
  path = tmp_path / "addresses"
  with pool_of(file=str(path)) as pool:
    pool.begin(versions[0], 0, [])
    path.write_text("nonsense\n")
    wait_until(lambda: "'nonsense': must be HOST:PORT" in caplog.text)
    assert not pool.advance([]).drawn and not pool.slots
    path.write_text(f"# workers\n\n127.0.0.1:{worker[1]}\n")
    wait_until(lambda: (pool.advance([]), len(pool.slots) == 4)[1])


def test_all_processes_of_a_trainer_hear_the_same(worker, versions):
  expected, _ = answers(EngineWorker(ENGINE), versions)
  with socket.create_server(("127.0.0.1", 0)) as free:
    coordinator = f"127.0.0.1:{free.getsockname()[1]}"

  def trainer(index, pool):
    group = processes.meet(coordinator, 2, index, {}, 60)
    try:
      return answers(SharedPool(pool, group), versions)
    finally:
      group.leave()

  with pool_of(worker[1]) as pool, futures.ThreadPoolExecutor(2) as both:
    (one, first), (other, second) = both.map(trainer, (0, 1), (pool, None))
  same(expected, one)
  assert {uid: rollout.to_dict() for uid, rollout in one.items()} == {
    uid: rollout.to_dict() for uid, rollout in other.items()
  }
  assert first.totals == second.totals
