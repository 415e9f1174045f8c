"""Certifying a data set: every image's certificate, kept as they come, and the curve that papers show."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .. import checks
from .._version import __version__
from ..engine import Model
from ..evaluation.outcome import wilson
from ..evaluation.probes import device_of
from ..evaluation.protocol import gathered
from ..evaluation.records import claim, fingerprint, fingerprint_of
from ..files import plain, replacing, write_text
from ..machine import device_name
from ..processes import Group
from ..progress import progress_bar
from ..report import Report, chart, finished
from .smoothing import Certificates, Smooth

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SECONDS = 10.0  # of work that a kill may cost, or one image's
VOTES = 100_000  # of the images that are certified together
TABLE = (0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0)  # radii, in sigma


@dataclass
class Certification:
    """The outcome of :func:`certify`.

    Attributes:
        certificates: of all images, in their order.
        y: int64 [N], the labels.
        settings: sigma, n0, n, alpha, seed, radius, precision, twin, samples, device, seconds and the version.
    """

    certificates: Certificates
    y: Tensor
    settings: dict[str, Any]

    def accuracy(self, radius: float = 0.0, norm: str = "l2") -> float:
        """Certified accuracy, in [0, 1]: the share of images whose label certainly holds within this distance.

        ``norm``: "l2", or "linf", whose ball of radius r lies in the l2 ball of r sqrt(d), d elements an image.
        """
        checks.one_of("norm", norm, ("l2", "linf"))
        reach = radius if norm == "l2" else radius * math.sqrt(self.settings["elements"])
        return float(self.certificates.right(self.y, reach).double().mean())

    def radii(self) -> list[float]:
        """Those of the table, in units of x: up to the first at which nothing is certified; the one that was asked for."""
        if self.settings["radius"] is not None:
            return [self.settings["radius"]]
        radii = [self.settings["sigma"] * r for r in TABLE]
        return radii[: 1 + next((i for i, r in enumerate(radii) if self.accuracy(r) == 0), len(radii))]

    @property
    def mean_radius(self) -> float:
        """Of the certificates, those that are wrong or missing counting 0 (ACR: Zhai et al., "MACER", 2020)."""
        return float((self.certificates.radius * self.certificates.right(self.y)).mean())

    def __str__(self) -> str:
        told, runs = self.settings, int(self.certificates.runs.sum())
        lines = [
            f"sigma {told['sigma']:g}, {told['samples']:,} samples, {told['n']:,} votes, alpha {told['alpha']:g}: "
            f"{runs:,} noisy images, the last call {told['seconds']:.1f} s"
        ]
        for radius in self.radii():
            lo, hi = wilson(self.accuracy(radius), len(self.y))
            lines.append(f"l2 radius {radius:<7.4g} {self.accuracy(radius):7.2%}  [{lo:.1%}, {hi:.1%}]")
        if told["radius"] is None:
            lines.append(f"mean radius {self.mean_radius:.4g}")
        return "\n".join(lines)

    def figure(self) -> Figure:
        """Certified accuracy against the radius, exact at each. Not where one radius alone was asked for."""
        if self.settings["radius"] is not None:
            raise ValueError(f"only the radius {self.settings['radius']} was asked for, which makes no curve")
        figure, axis = chart("l2 radius", "certified accuracy")
        right = self.certificates.right(self.y)
        radii = torch.cat([torch.zeros(1), self.certificates.radius[right].sort().values]).tolist()
        if radii[-1] > 0:
            shares = [float(right.double().mean())] + [(len(radii) - i) / len(self.y) for i in range(1, len(radii))]
            axis.plot([*radii, radii[-1]], [*shares, 0.0], drawstyle="steps-pre", label=f"sigma {self.settings['sigma']:g}")
        axis.set_xlim(left=0)
        return finished(figure, axis, percent=True)

    def write(self, folder: str | Path) -> Path:
        """Writes certification.html, certification.md and certification.json, each whole or not at all; the page's path."""
        folder, told = Path(folder), self.settings
        report = Report("Certified robustness", f"randomised smoothing, sigma {told['sigma']:g}, {told['samples']:,} samples")
        if told["radius"] is None:
            abstains = float((self.certificates.labels < 0).double().mean())
            report.headline(
                [
                    ("Certified accuracy", f"{self.accuracy():.1%}", "right and not abstaining, at radius 0"),
                    ("Abstains", f"{abstains:.1%}", "the votes are too close"),
                    ("Mean radius", f"{self.mean_radius:.3g}", "l2, 0 where wrong"),
                ]
            )
        else:
            asked = told["radius"]
            report.headline([("Certified accuracy", f"{self.accuracy(asked):.1%}", f"within l2 distance {asked:g}")])
        report.text(
            f"Within its radius no perturbation changes the smoothed classifier's answer. Each certificate is wrong with a "
            f"probability of at most {told['alpha']:g}, over the noise. What is certified is the vote under noise of sigma "
            f"{told['sigma']:g}, not the network itself."
        )
        rows = [(f"{r:.4g}", f"{self.accuracy(r):.1%}", _interval(self.accuracy(r), len(self.y))) for r in self.radii()]
        if told["radius"] is None:
            report.figure(self.figure(), "The share of images that are right within each distance.", "Certified accuracy.")
        report.table(["l2 radius", "certified accuracy", "95% interval"], rows, "An l2 radius r holds r / sqrt(d) in linf.")
        report.table([], [(name, f"{value}") for name, value in told.items()], "Settings.")
        numbers = {
            "accuracy": {f"{r:g}": self.accuracy(r) for r in self.radii()},
            "mean_radius": self.mean_radius if told["radius"] is None else None,
            "settings": told, "labels": self.y, "certificates": self.certificates,
        }  # fmt: skip
        files = {
            "certification.json": json.dumps(plain(numbers), indent=1, allow_nan=False) + "\n",
            "certification.md": report.markdown(),
            "certification.html": report.html(),
        }
        for name, text in files.items():
            write_text(folder / name, text)
        return folder / "certification.html"


def _interval(share: float, samples: int) -> str:
    lo, hi = wilson(share, samples)
    return f"{lo:.1%} to {hi:.1%}"


def certify(
    model: Model,
    data: tuple[Tensor, Tensor] | Iterable[tuple[Tensor, Tensor]],
    sigma: float,
    n0: int = 100,
    n: int = 10_000,
    alpha: float = 0.001,
    radius: float | None = None,
    batch_size: int = 256,
    seed: int = 0,
    precision: str = "fp32",
    twin: bool = False,
    resume: str | Path | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Certification:
    """Certified accuracy by randomised smoothing: ``print(fastadv.certify.certify(model, (x, y), sigma=0.25))``.

    Args:
        model, sigma, seed, batch_size, precision, twin: as :class:`Smooth`.
        data: ``(x, y)``, images and integer labels, or batches of them, which are gathered first.
        n0, n, alpha, radius: as :meth:`Smooth.certify`. Papers take n = 100,000; the radius that n can certify at most is
            3.2 sigma at 10,000 and 3.8 at 100,000.
        resume: a folder. What has been certified is kept there every ten seconds, and the same call goes on from there.
        device: where to work; default: that of the model.
        progress: a bar, on a terminal.

    Under torchrun, with torch.distributed initialised, the processes share the images, and all return the same.

    Raises:
        ValueError: an argument, the data or the model's output is not as described, or ``resume`` holds something else.
    """
    x, y = gathered(data)
    checks.labelled(x, y, -math.inf, math.inf)
    smooth = Smooth(model, sigma, seed, batch_size, precision, twin)
    on = torch.device(device) if device is not None else device_of(smooth.model, x)
    smooth.certify(x[:0].to(on), n0, n, alpha, radius)  # which refuses what is wrong with them
    asked = {"n0": int(n0), "n": int(n), "alpha": float(alpha), "radius": None if radius is None else float(radius)}
    header = {
        "fastadv": __version__, "sigma": smooth.sigma, "seed": smooth.seed, **asked, "precision": precision, "twin": bool(twin),
        "data": fingerprint(x, y),
        "model": fingerprint_of(smooth.model, x[:4].to(on)),
    }  # fmt: skip
    start = time.monotonic()
    kept = _Kept(None if resume is None else Path(resume), header, len(x))
    group = Group()
    known = torch.stack(group.gathered(kept.known())).any(0)
    mine = (~known).nonzero()[group.rank :: group.number, 0]
    together = max(1, VOTES // n)
    with progress_bar("certifying", len(mine), "image", progress and group.rank == 0) as bar:
        for some in torch.split(mine, together) if len(mine) else ():
            kept.add(some, smooth.certify(x[some.to(x.device)].to(on), **asked))  # type: ignore[arg-type]
            bar.update(len(some))
        kept.write()
    found = _in_order([pair for pairs in group.gathered(kept.pairs) for pair in pairs], len(x))
    settings = {
        "sigma": smooth.sigma,
        **asked,
        "seed": smooth.seed,
        "precision": precision,
        "twin": bool(twin),
        "samples": len(x),
        "elements": x[0].numel(),
        "device": device_name(on),
        "fastadv": __version__,
    }
    return Certification(found, y.long().cpu(), settings | {"seconds": time.monotonic() - start})


def _in_order(pairs: Sequence[tuple[Tensor, Certificates]], samples: int) -> Certificates:
    numbers, certificates = torch.cat([some for some, _ in pairs]), Certificates.joined([c for _, c in pairs])
    place = torch.empty(samples, dtype=torch.int64)
    place[numbers] = torch.arange(len(numbers))  # of what two processes have found, either
    return Certificates(*(value[place] for value in vars(certificates).values()))


class _Kept:
    """Certificates by the numbers of their images: in memory, and in a folder where one is given."""

    def __init__(self, folder: Path | None, header: dict[str, Any], samples: int) -> None:
        self.folder, self.samples = folder, samples
        self.pairs: list[tuple[Tensor, Certificates]] = []
        self._written, self._at = 0, time.monotonic()
        if folder is not None:
            claim(folder, header)
            for file in sorted(folder.glob("*.pt")):
                try:
                    held = torch.load(file, weights_only=True)
                    self.pairs.append((held.pop("samples"), Certificates(**held)))
                except Exception as error:
                    raise ValueError(f"{file} holds no certificates, remove it and go on: {error}") from error
            self._written = len(self.pairs)

    def known(self) -> Tensor:
        """bool [samples]."""
        known = torch.zeros(self.samples, dtype=torch.bool)
        for some, _ in self.pairs:
            known[some] = True
        return known

    def add(self, some: Tensor, certificates: Certificates) -> None:
        self.pairs.append((some, certificates))
        if time.monotonic() - self._at > SECONDS:
            self.write()

    def write(self) -> None:
        """What is new, in a file of its own."""
        new = self.pairs[self._written :]
        if self.folder is not None and new:
            some = torch.cat([numbers for numbers, _ in new])
            with replacing(self.folder / f"{int(some[0]):08d}.pt") as temporary:
                torch.save({"samples": some} | vars(Certificates.joined([c for _, c in new])), temporary)
        self._written, self._at = len(self.pairs), time.monotonic()
