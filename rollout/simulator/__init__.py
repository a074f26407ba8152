"""What a rollout schedule costs, without a model: C3PO++ and the schedules it is compared with over a trace of answer lengths.

    trace (lengths.py)  ->  simulation.py  ->  outcome.py  ->  report.py, picture.py
                              |
                              clock.py: slots that draw one token a step, priced by costs.py

`simulation.py` drives the scheduler of the live driver, so its decisions are the live ones.  `calibration.py` fits the prices to a
real run.  The command is `python -m rollout.simulate`; docs/simulator.md is the chapter.
"""
