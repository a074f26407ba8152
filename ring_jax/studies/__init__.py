"""Studies: a claim of the papers, shown in kind on a small machine by one command.

    points          what is measured, each in a process of its own    study.py, child.py
      -> runner.py  side by side on the cores that there are; what is done stays done
      -> results    one JSON object a point
      -> report     means with confidence intervals, pictures, findings    statistics.py, figures.py
      -> page.py    a Markdown page, of which docs/evidence.md is made

A study is one file: mismatch.py, stability.py, router_replay.py, c3po.py, placement.py, scale.py.  `catalogue.py` has them by
name.  The command is `python -m ring_jax.launch.study`.
"""
