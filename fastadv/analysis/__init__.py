"""What the papers on adversarial robustness show in figures, as functions: each returns a finding, which says what came out
and draws it.

    found = fastadv.analysis.weight_landscape({"PGD-AT": first, "AWP": second}, x, y, eps=0.3)
    print(found)
    found.figure().savefig("landscape.svg")

From the shell: ``fastadv analyze landscape first.pt second.pt --data digits --eps 0.3``.
"""

from .finding import Finding

__all__ = ["Finding"]
