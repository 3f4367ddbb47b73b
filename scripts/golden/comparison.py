"""Accumulates how far our results are from the recorded ones."""

import math
from collections import Counter
from collections.abc import Sequence
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from scripts.golden.recording import Recording

# Features, heads, losses, gradients and probabilities: the golden README calls 1e-5 comfortable.
TOLERANCE = 1e-5
# Where the recording gives float32's own error, allow for ours being several times that.
NOISE_FACTOR = 10.0
# Statistics of independent draws: a few hundred comparisons at 5 standard errors raise a false alarm in about 1e-4.
STANDARD_ERRORS = 5.0


class Comparison:
    """Compares results with one :class:`Recording` and remembers the worst deviation.

    A tensor agrees when both ``max |ours - theirs| <= tolerance * max(1, max |theirs|)`` and
    ``||ours - theirs|| <= tolerance * ||theirs||`` hold, so that small gradients do not hide behind an absolute bound.

    Attributes:
        cases: Number of comparisons made.
        worst_abs, worst_rel: Largest absolute error and largest relative error (norm of difference / norm).
        worst_z: Largest deviation of a statistic in standard errors (SE); None when no statistic was compared.
        failures: One line per comparison that is off.
        left_out: Reason -> number of recorded values not compared.
    """

    def __init__(self, recording: Recording, *, verbose: bool = False) -> None:
        self.recording = recording
        self.verbose = verbose
        self.cases = 0
        self.worst_abs = 0.0
        self.worst_rel = 0.0
        self.worst_z: float | None = None
        self.failures: list[str] = []
        self.left_out: Counter[str] = Counter()
        self.tolerances: set[float] = set()
        self.levels_allowed: float | None = None
        self._compared: set[str] = set()

    @property
    def ok(self) -> bool:
        return not self.failures

    def tensor(self, name: str, ours: Tensor, *, tolerance: float = TOLERANCE) -> None:
        """Compares ``ours`` with the recorded tensor ``name``, in value, shape and kind of dtype."""
        theirs = self.recording.tensors[name]
        self._compared.add(name)
        noise = self.recording.noise.get(name, {})
        self.close(
            name,
            ours,
            theirs,
            tolerance=max(tolerance, NOISE_FACTOR * noise.get("rel_l2", 0.0)),
            noise=noise.get("max_abs", 0.0),
            relative=theirs.ndim > 0,
        )

    def tensors(self, ours: dict[str, Tensor], *, tolerance: float = TOLERANCE) -> None:
        """Compares those of our tensors that were recorded; :meth:`finish` sees to it that no recorded one is left."""
        for name, value in ours.items():
            if name in self.recording:
                self.tensor(name, value, tolerance=tolerance)

    def close(
        self,
        label: str,
        ours: Tensor | float,
        theirs: Tensor | float,
        *,
        tolerance: float,
        noise: float = 0.0,
        relative: bool = True,
    ) -> None:
        """Compares two tensors or numbers in value.

        Args:
            label: What is compared.
            ours, theirs: Values of the same shape.
            tolerance: See the class.
            noise: The recorded absolute error of float32, if any.
            relative: Also bound the relative error; off for losses, which may be close to zero.
        """
        a, b = (torch.as_tensor(x).detach().cpu() for x in (ours, theirs))
        if a.shape != b.shape:
            self._note(label, f"shape {tuple(a.shape)} instead of {tuple(b.shape)}", failed=True)
            return
        if not b.is_floating_point() or not a.is_floating_point():
            self.exact(label, a, b)
            return
        a, b = a.double(), b.double()
        difference = (a - b).abs()
        worst = difference.max().item() if difference.numel() else 0.0
        size = b.abs().max().item() if b.numel() else 0.0
        norm = b.norm().item()
        rel = difference.norm().item() / norm if norm > 0 else worst
        # NaN compares false with everything, hence "not within" rather than "beyond".
        within_abs = worst <= max(tolerance * max(1.0, size), NOISE_FACTOR * noise)
        within = within_abs and (rel <= tolerance or not relative)
        self._measure(worst, rel if relative else 0.0, tolerance)
        self._note(label, f"abs {worst:.2e} rel {rel:.2e} (tolerance {tolerance:.1e})", failed=not within)

    def exact(self, label: str, ours: Any, theirs: Any) -> None:
        """Compares tensors bit by bit and anything else with ``==``."""
        if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
            if label in self.recording.tensors:
                self._compared.add(label)
            same = ours.shape == theirs.shape and bool((ours == theirs).all())
            detail = f"{tuple(ours.shape)}" if same else f"differs from the recorded {tuple(theirs.shape)}"
        else:
            same = bool(ours == theirs)
            detail = "equal" if same else f"{_short(ours)} instead of {_short(theirs)}"
        if same:
            self._measure(0.0, 0.0, 0.0)
        self._note(label, detail, failed=not same)

    def levels(self, name: str, ours: Tensor, *, allowed: float) -> None:
        """Compares an image with the recorded tensor ``name``, allowing each value to be ``allowed`` off."""
        theirs = self.recording.tensors[name]
        self._compared.add(name)
        if ours.shape != theirs.shape:
            self._note(name, f"shape {tuple(ours.shape)} instead of {tuple(theirs.shape)}", failed=True)
            return
        difference = ours.double() - theirs.double()
        worst = difference.abs().max().item()
        self._measure(worst, (difference.norm() / theirs.double().norm().clamp(min=1e-12)).item(), 0.0)
        self.levels_allowed = max(allowed, self.levels_allowed or 0.0)
        self._note(name, f"abs {worst:.2e} (allowed {allowed:g})", failed=not worst <= allowed)

    def statistic(self, label: str, ours: float, theirs: float, standard_error: float) -> None:
        """Compares two estimates of one quantity, ``standard_error`` being that of their difference."""
        difference = abs(ours - theirs)
        # Rounding of quantities that do not vary at all, such as the share of something that never happens.
        z = 0.0 if difference <= 1e-6 * max(1.0, abs(theirs)) else difference / max(standard_error, 1e-12)
        self._judge(label, ours, theirs, z)

    def _judge(self, label: str, ours: float, theirs: float, z: float) -> None:
        self.worst_z = _larger(self.worst_z or 0.0, z)
        detail = f"{ours:.6g} against {theirs:.6g}, {z:.2f} standard errors"
        self._note(label, detail, failed=not z <= STANDARD_ERRORS)

    def mean(self, label: str, draws: Tensor, mean: float, std: float, recorded_draws: int) -> None:
        """Compares the mean of our draws with a recorded mean of ``recorded_draws`` draws that scatter by ``std``."""
        draws = draws.double()
        # The larger spread, because rare events may have missed one side.
        spread = max(draws.std().item(), std)
        standard_error = spread * math.sqrt(1 / len(draws) + 1 / recorded_draws)
        self.statistic(label, draws.mean().item(), mean, standard_error)

    def spread(self, label: str, draws: Tensor, std: float, recorded_draws: int) -> None:
        """Compares the standard deviation of our draws with a recorded one of ``recorded_draws`` draws."""
        draws = draws.double()
        centered = draws - draws.mean()
        variance = centered.square().mean().item()
        # Delta method: the spread of the squares comes from the fourth moment, that of their root from its derivative.
        of_squares = math.sqrt(max(centered.pow(4).mean().item() - variance**2, 0.0))
        of_root = of_squares / (2 * math.sqrt(max(variance, 1e-24)))
        standard_error = of_root * math.sqrt(1 / len(draws) + 1 / recorded_draws)
        self.statistic(label, math.sqrt(variance), std, standard_error)

    def share(self, label: str, hits: Tensor, share: float, recorded_draws: int) -> None:
        """Compares how often something happened: ``hits`` (draws,) bool against a share of ``recorded_draws``."""
        self.shares(label, hits[:, None], torch.tensor([share], dtype=torch.float64), recorded_draws)

    def shares(self, label: str, hits: Tensor, shares: Tensor, recorded_draws: int) -> None:
        """Compares several shares at once, by the one that is furthest off: ``hits`` (draws, ...) against (...).

        The arcsine of its root gives a share a spread that does not depend on how rare it is, and near-normal tails.
        """
        if label in self.recording.tensors:
            self._compared.add(label)
        ours, theirs = hits.double().mean(0).flatten(), shares.double().flatten().clamp(0, 1)
        z = 2 * (ours.sqrt().asin() - theirs.sqrt().asin()).abs() / math.sqrt(1 / len(hits) + 1 / recorded_draws)
        worst = int(z.argmax())
        self._judge(label, ours[worst].item(), theirs[worst].item(), _as_single(z[worst].item(), len(z)))

    def quantile(self, label: str, draws: Tensor, q: float, value: float, recorded_draws: int) -> None:
        """Compares a recorded quantile with our draws: the share of them below it must be about ``q``."""
        below = (draws < value - 1e-9).double().mean().item()
        up_to = (draws <= value + 1e-9).double().mean().item()
        # Where many draws equal the value, any share between the two will do.
        share = min(max(q, below), up_to)
        standard_error = math.sqrt(q * (1 - q) * (1 / len(draws) + 1 / recorded_draws))
        self.statistic(label, share, q, standard_error)

    def leave_out(self, reason: str, *names: str, count: int = 0) -> None:
        """Declares recorded tensors (``names``) or other recorded values (``count``) as not compared, and why."""
        self._compared.update(names)
        self.left_out[reason] += len(names) + count

    def tolerance_text(self) -> str:
        """The tolerances that were applied, in a few words."""
        bounds = sorted({tolerance for tolerance in self.tolerances if tolerance > 0})
        parts = []
        if bounds:
            parts.append(f"{bounds[0]:.0e}" + (f" to {bounds[-1]:.0e}" if len(bounds) > 1 else ""))
        if self.levels_allowed is not None:
            parts.append(f"{self.levels_allowed:g} level")
        if self.worst_z is not None:
            parts.append(f"{self.worst_z:.1f} of {STANDARD_ERRORS:g} SE")
        return ", ".join(parts) or "exact"

    def finish(self) -> None:
        """Turns recorded tensors that the replay neither used nor compared into a failure."""
        forgotten = sorted(set(self.recording.tensors) - self._compared - self.recording.inputs)
        if self.cases == 0:
            self.fail("the recording holds nothing to compare")
        if forgotten:
            self.fail(f"{len(forgotten)} recorded tensors were not replayed: {_short(forgotten)}")

    def fail(self, message: str) -> None:
        """Records a failure that is not a comparison."""
        self.failures.append(message)

    def _measure(self, worst: float, relative: float, tolerance: float) -> None:
        self.worst_abs = _larger(self.worst_abs, worst)
        self.worst_rel = _larger(self.worst_rel, relative)
        self.tolerances.add(tolerance)

    def _note(self, label: str, detail: str, *, failed: bool) -> None:
        self.cases += 1
        if failed:
            self.failures.append(f"{label}: {detail}")
        if self.verbose:
            print(f"    {'OFF ' if failed else '    '}{label}: {detail}")


def _larger(a: float, b: float) -> float:
    """Maximum in which NaN wins, so that it cannot go unnoticed."""
    return b if math.isnan(b) or b > a else a


def _as_single(z: float, count: int) -> float:
    """The deviation of a single comparison that is as unlikely as the worst of ``count`` being ``z`` (Bonferroni)."""
    probability = count * math.erfc(z / math.sqrt(2))
    if count == 1 or probability < 1e-300:
        return z
    return max(-NormalDist().inv_cdf(min(probability, 1.0) / 2), 0.0)


def _short(value: Any, limit: int = 160) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        value = list(value)
    text = str(value)
    return text if len(text) <= limit else f"{text[:limit]}..."
