"""What an evaluation has found: numbers for programs, a page for people, and a file for RobustBench."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import Tensor

from .. import info
from ..files import plain, write_text
from .alarms import CHECKLIST, Alarm
from .curves import Curves

ROBUSTBENCH = (
    "link", "name", "authors", "additional_data", "number_forward_passes", "dataset", "venue", "architecture", "eps",
    "clean_acc", "reported", "autoattack_acc", "footnote", "unreliable",
)  # fmt: skip
TEXTS = ("link", "name", "authors", "dataset", "venue", "architecture")  # "" while unknown


@dataclass(frozen=True)
class Row:
    """What one attack has done.

    Attributes:
        tried: samples that had survived until then.
        broken: of these.
        rejected: images that the attack called adversarial and that are not: outside ball or box, or not fooling the model.
        robust_accuracy: after it, in [0, 1].
        queries: forward passes a sample, on average. ``seconds``: of all processes.
    """

    attack: str
    tried: int
    broken: int
    rejected: int
    robust_accuracy: float
    queries: float
    seconds: float


@dataclass
class Evaluation:
    """The outcome of :func:`fastadv.evaluate`.

    Attributes:
        clean_accuracy, robust_accuracy: in [0, 1].
        rows: one an attack, in order.
        broken_by: for each sample the attack that fooled the model first, "clean" where it is wrong by itself, or "".
        labels, predicted: [N]; ``predicted`` of the adversarial images, of the clean ones where there is none.
        distance: [N], of the adversarial images from the clean ones, in the norm; inf where there is none.
        settings: eps, norm, version and the like.
        alarms: signs that the number is not to be trusted (:mod:`fastadv.evaluation.alarms`).
        checklist: what no program sees.
        x, x_adv: [N, ...], clean images, and adversarial ones, clean where there is none; None unless asked for.
        curves: accuracy and loss against eps and steps, where they were measured
            (:func:`fastadv.evaluation.robustness_curves`).
    """

    clean_accuracy: float
    robust_accuracy: float
    rows: list[Row]
    broken_by: list[str]
    labels: Tensor
    predicted: Tensor
    distance: Tensor
    settings: dict[str, Any]
    alarms: list[Alarm] = field(default_factory=list)
    checklist: tuple[str, ...] = CHECKLIST
    x: Tensor | None = None
    x_adv: Tensor | None = None
    curves: Curves | None = None

    @property
    def trusted(self) -> bool:
        """Whether alarms were looked for and none rings."""
        return bool(self.alarms) and not self.ringing

    @property
    def ringing(self) -> list[Alarm]:
        return [alarm for alarm in self.alarms if alarm.rings]

    def interval(self, accuracy: float) -> tuple[float, float]:
        """What so many samples tell of an accuracy among them: its 95% interval, :func:`wilson`."""
        return wilson(accuracy, len(self.labels))

    def __str__(self) -> str:
        lines = [described(self.settings), f"{'clean':<12}{self._with_interval(self.clean_accuracy)}"]
        for row in self.rows:
            done = f"{row.broken} of {row.tried} broken, {row.seconds:.1f} s"
            lines.append(f"{row.attack:<12}{self._with_interval(row.robust_accuracy)}  {done}")
        lines += [f"ALARM {alarm.name}: {alarm.advice}" for alarm in self.ringing]
        return "\n".join(lines)

    def _with_interval(self, accuracy: float) -> str:
        lo, hi = self.interval(accuracy)
        return f"{accuracy:7.2%}  [{lo:.1%}, {hi:.1%}]"

    def to_json(self) -> dict[str, Any]:
        """All but images as what json.dumps takes; a number that is not finite is None."""
        samples = {"broken_by": self.broken_by, "label": self.labels, "predicted": self.predicted, "distance": self.distance}
        told = {
            "clean_accuracy": self.clean_accuracy,
            "clean_interval": self.interval(self.clean_accuracy),
            "robust_accuracy": self.robust_accuracy,
            "robust_interval": self.interval(self.robust_accuracy),
            "trusted": self.trusted,
            "attacks": self.rows,
            "alarms": self.alarms,
            "checklist": self.checklist,
            "curves": self.curves,
            "settings": self.settings,
            "environment": info.environment(),
            "samples": samples,
        }
        return {name: plain(value) for name, value in told.items()}

    def robustbench(self, **fields: Any) -> dict[str, Any]:
        """What a file of RobustBench's model_info holds, accuracies in percent as text.

        ``autoattack_acc`` is filled in by version "standard" alone, ``unreliable`` where alarms were looked for.

        Args:
            fields: name, authors, link, dataset, architecture and whatever else only the author knows. What nobody knows is
                empty or None.

        Raises:
            ValueError: a field that RobustBench does not have.
        """
        if unknown := [name for name in fields if name not in ROBUSTBENCH]:
            raise ValueError(f"fields must be among {', '.join(ROBUSTBENCH)}; got {', '.join(unknown)}")
        robust = f"{100 * self.robust_accuracy:.2f}"
        version = self.settings["version"]
        found = {
            "eps": radius(self.settings["eps"]),
            "clean_acc": f"{100 * self.clean_accuracy:.2f}",
            "reported": robust,
            "autoattack_acc": robust if version == "standard" else None,
            "footnote": f"{len(self.labels)} samples, version {version} of fastadv {self.settings['fastadv']}.",
            "unreliable": not self.trusted if self.alarms else None,
        }
        return dict.fromkeys(ROBUSTBENCH) | dict.fromkeys(TEXTS, "") | found | fields

    def write(self, folder: str | Path, **fields: Any) -> Path:
        """Writes evaluation-report.html, report.md, report.json and robustbench.json, each whole or not at all.

        Args:
            folder: made if missing.
            fields: of :meth:`robustbench`.

        Returns:
            The path of the page.
        """
        from .page import page  # which is made of what stands here

        folder = Path(folder)
        files = {
            "robustbench.json": json.dumps(self.robustbench(**fields), indent=2, allow_nan=False) + "\n",
            "report.json": json.dumps(self.to_json(), indent=1, allow_nan=False) + "\n",
            "report.md": page(self, figures=False).markdown(),
            "evaluation-report.html": page(self).html(),
        }
        for name, text in files.items():
            write_text(folder / name, text)
        return folder / "evaluation-report.html"


def wilson(share: float, samples: int) -> tuple[float, float]:
    """The 95% interval of a probability of which ``share`` of so many samples came out (Wilson, 1927).

    Unlike share +- 2 sigma it stays inside [0, 1] and has a width at 0 and at 1 too.
    """
    z2 = 1.959964**2
    centre = (share * samples + z2 / 2) / (samples + z2)
    half = math.sqrt(z2 * (share * (1 - share) * samples + z2 / 4)) / (samples + z2)
    return max(0.0, centre - half), min(1.0, centre + half)


def described(settings: Mapping[str, Any]) -> str:
    """The threat model and the protocol in one line."""
    samples = f"{settings['samples']:,} sample{'s' * (settings['samples'] != 1)}"
    return (
        f"{settings['norm']} eps {radius(settings['eps'])}, {samples}, version {settings['version']}, seed {settings['seed']}"
    )


def radius(eps: float) -> str:
    """0.3 as "0.3", 8/255 as "8/255"."""
    short, levels = f"{eps:g}", round(eps * 255)
    return f"{levels}/255" if float(short) != eps and math.isclose(levels / 255, eps) else short
