"""``ncu --profile-from-start off python -m benchmarks.ncu``: one call of each of a few kernels, as the cases call them."""

from __future__ import annotations

import torch

from . import ops, weights

CASES = (
    "linf_step_ 128x3x224x224", "l2_step_ 128x3x224x224", "l2_step_ 128x3x32x32", "l1_step_ 128x3x32x32",
    "awp wrn-34-10", "ce 128x10", "ce 8192x1000", "ce 8192x21841", "dlr 8192x1000", "kl 8192x1000",
)  # fmt: skip


def main() -> None:
    device = torch.device("cuda")
    cases = {case.name: case for case in ops.cases(False, device) + weights.cases(False, device)}
    for name in CASES:
        given = cases[name].inputs(device)
        for backend in ("fastadv", "fastadv, triton"):
            contender = cases[name].contenders[backend](given)
            with contender.setting():
                for _ in range(3):  # the first ones load and compile
                    contender.run()
                torch.cuda.synchronize()
                torch.cuda.profiler.start()
                contender.run()
                torch.cuda.synchronize()
                torch.cuda.profiler.stop()


if __name__ == "__main__":
    main()
