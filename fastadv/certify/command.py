"""``fastadv certify``: a checkpoint and a file of samples from the disk to a page of certificates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from .. import checks
from ..evaluation.command import load, try_on
from ..evaluation.page import has_matplotlib
from ..processes import device as device_of
from ..processes import processes
from .protocol import Certification, certify


def run(
    checkpoint: str,
    data: str,
    sigma: float,
    model: str | None = None,
    samples: int | None = None,
    device: str | None = None,
    out: str | Path = "fastadv-certification",
    **settings: Any,
) -> Certification:
    """Certifies a checkpoint, prints what comes out and writes it into a folder.

    Args:
        checkpoint, model, data: as of ``fastadv evaluate``. samples: only the first so many.
        sigma, settings: of :func:`certify`.
        out: folder of the page; what has been found is kept in its subfolder "state", from which the same call goes on.

    Raises:
        ValueError, OSError: something is not as described; the message says what.
    """
    network, x, y = load(checkpoint, model, data, samples)
    checks.number("sigma", sigma, positive=True)
    if not has_matplotlib():
        raise ValueError("the page has a figure, drawn by matplotlib: pip install 'fastadv[certify]'")
    chosen = device_of(device)
    with processes() as rank:
        network = network.to(chosen).eval()
        try_on(network, x[:1].to(chosen))
        found = certify(network, (x, y), sigma, resume=Path(out) / "state", device=chosen, **settings)
        if rank == 0:
            print(f"{found}\n\nReport: {found.write(out)}")
    return found
