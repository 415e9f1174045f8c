"""What fastadv is measured against, and how: ``python -m benchmarks`` or ``pytest benchmarks --benchmark-only``.

``timing`` is the only file that holds a clock. ``ops``, ``weights`` and ``attacks`` define the cases, ``baselines`` and
``peers`` are the competition, ``models`` is what gets attacked, ``memory`` counts what autograd keeps meanwhile, ``report``
makes the table and the JSON. NOTES.md holds what was found.
"""
