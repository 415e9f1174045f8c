"""What fastadv is measured against, and how: ``python -m benchmarks`` or ``pytest benchmarks --benchmark-only``.

``timing`` is the only file that holds a clock. ``ops``, ``weights``, ``attacks`` and ``training`` define the cases,
``baselines`` and ``peers`` are the competition, ``models`` is what gets attacked, ``memory`` counts what autograd keeps
meanwhile, ``run`` measures case after case, ``report`` makes the table and the JSON. ``end_to_end`` is a command of its own:
whole attacks and training steps by engine, precision and batch size, which ``plots`` draws. NOTES.md holds what was found.
"""
