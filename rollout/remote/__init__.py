"""Rollout workers in other processes and on other hosts (docs/workers.md).

    trainer:  driver -> WorkerPool (pool.py) -> a RemoteWorker each (client.py)
                                                   |  worker.proto, over gRPC
    worker:   EngineService (rollout/service.py) <- RLService (server.py)

The scheduler is the trainer's and knows nothing of this: workers are slots that come and go.
"""
