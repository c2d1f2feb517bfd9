"""How near two sets of pictures are, by their features. Everything is computed in float64.

Shapes: N real pictures, M generated ones, D features.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from liquid_diffusion.errors import UserError, first_line

_ROWS = 1024  # of a matrix of distances computed at once
LEAST_PICTURES = 4  # pictures that a distance can be told from


@dataclass(frozen=True)
class Estimate:
    """A figure and its standard error."""

    value: float
    standard_error: float


def _check(*sets: Tensor) -> None:
    if any(len(features) < LEAST_PICTURES for features in sets):
        raise UserError(f"A comparison needs at least {LEAST_PICTURES} pictures on each side.")


def _torchmetrics(metric: str) -> ModuleType:
    """A module of torchmetrics' images. torchmetrics imports torch-fidelity wherever it is installed, and that one
    torchvision, which is a RuntimeError where it was built for another torch."""
    try:
        return importlib.import_module(f"torchmetrics.image.{metric}")
    except ImportError as error:
        raise UserError(f"An evaluation needs an extra: pip install 'liquid-diffusion[eval]' ({error}).") from error
    except RuntimeError as error:
        raise UserError(
            f"torchmetrics can't be imported ({first_line(error)}): install a torchvision that fits torch, or "
            "uninstall torch-fidelity."
        ) from error


class _GivenFeatures(nn.Module):
    """Lets torchmetrics take features that are computed already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        return features


def frechet_distance(real: Tensor, generated: Tensor) -> float:
    """``|m - m'|^2 + tr(C + C' - 2 (C C')^(1/2))`` of the means and covariances of real (N, D), generated (M, D).

    Its bias falls with the number of pictures and is large below D of them: only figures of the same N and M may be
    compared. With Inception's features it is the FID (Heusel et al., arXiv 1706.08500). By torchmetrics.

    Raises:
        UserError: one of the sets is nearly empty.
    """
    _check(real, generated)
    metric = (
        _torchmetrics("fid").FrechetInceptionDistance(feature=_GivenFeatures(real.shape[1])).set_dtype(torch.float64)
    )
    metric.update(real.double(), real=True)
    metric.update(generated.double(), real=False)
    return float(metric.compute())


def _kernel_sums(x: Tensor, y: Tensor) -> Tensor:
    """Row sums (len(x),) of the kernel ``(x . y / D + 1)^3``."""
    poly_kernel = _torchmetrics("kid").poly_kernel
    return torch.cat([poly_kernel(rows, y).sum(1) for rows in x.split(_ROWS)])


def kernel_distance(real: Tensor, generated: Tensor) -> Estimate:
    """Squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``; 0 for equal distributions.

    The unbiased estimator of Gretton et al. (2012, Lemma 6) over all pairs at once: the mean over all real pairs, plus
    that over all generated pairs, minus twice that over all mixed ones. So there are no random subsets (Binkowski et
    al., arXiv 1801.01401, average over some; the expectation is the same), the numbers of pictures may differ, and the
    value may come out a little under zero. The standard error is the jackknife's: the value is computed again without
    each picture in turn, which the sums of the kernel's rows give without a second pass, and
    ``(N - 1) / N sum_i (KD_-i - mean)^2`` is added up over the real and over the generated pictures. It tells how far
    the figure would move with other pictures, not with another training of the model; for sets that hardly differ it is
    up to sqrt 2 too large (both are tested).

    Args:
        real, generated: (N, D) and (M, D).

    Raises:
        UserError: one of the sets is nearly empty.
    """
    _check(real, generated)
    x, y = real.double(), generated.double()
    n, m = len(x), len(y)
    own_x = _kernel_sums(x, x) - _own(x)  # (N,): each picture with all others of its set
    own_y = _kernel_sums(y, y) - _own(y)  # (M,)
    mixed_x, mixed_y = _kernel_sums(x, y), _kernel_sums(y, x)  # (N,), (M,): each with all of the other set
    within_x, within_y, mixed = own_x.sum() / (n * (n - 1)), own_y.sum() / (m * (m - 1)), mixed_x.sum() / (n * m)
    without_x = (own_x.sum() - 2 * own_x) / ((n - 1) * (n - 2)) + within_y
    without_x -= 2 * (mixed_x.sum() - mixed_x) / ((n - 1) * m)
    without_y = (own_y.sum() - 2 * own_y) / ((m - 1) * (m - 2)) + within_x
    without_y -= 2 * (mixed_y.sum() - mixed_y) / ((m - 1) * n)
    variance = sum((len(v) - 1) * v.var(unbiased=False) for v in (without_x, without_y))
    return Estimate(float(within_x + within_y - 2 * mixed), float(variance) ** 0.5)


def _own(x: Tensor) -> Tensor:
    """The kernel of each picture with itself (len(x),)."""
    return (x.square().mean(1) + 1) ** 3


def nearest_rows(x: Tensor, y: Tensor, rank: int = 1) -> tuple[Tensor, Tensor]:
    """The `rank`-nearest row of y (K, D) to each row of x (M, D): Euclidean distances (M,) and numbers (M,)."""
    y = y.double()
    found = [torch.cdist(rows.double(), y).kthvalue(rank, dim=1) for rows in x.split(_ROWS)]
    return torch.cat([some.values for some in found]), torch.cat([some.indices for some in found])


def precision_recall(real: Tensor, generated: Tensor, neighbours: int = 3) -> tuple[float, float]:
    """Share of generated pictures among the real ones, and of real pictures among the generated ones.

    A picture is "among" a set if it lies nearer to some picture of it than that picture's `neighbours`-nearest other
    one (Kynkaanniemi et al., arXiv 1904.06991). Both depend on the sizes of the sets.

    Args:
        real, generated: (N, D) and (M, D), of equal size for a figure that can be compared.
        neighbours: k.

    Raises:
        UserError: one of the sets is nearly empty.
    """
    _check(real, generated)
    neighbours = min(neighbours, len(real) - 1, len(generated) - 1)

    def share(x: Tensor, among: Tensor) -> float:
        radius, _ = nearest_rows(among, among, neighbours + 1)  # the nearest of all is the picture itself
        inside = [(torch.cdist(rows.double(), among.double()) <= radius).any(1) for rows in x.split(_ROWS)]
        return float(torch.cat(inside).double().mean())

    return share(generated, real), share(real, generated)


def compare(real: Tensor, generated: Tensor, most: int | None = None) -> dict[str, float | int]:
    """All distances of two sets, by the names that they have in JSON and in tables.

    The kernel distance takes all pictures. The figures that depend on the sizes of the sets take as many of both,
    those of the larger set at equal distances.

    Args:
        real, generated: features (N, D) and (M, D).
        most: of either side for these figures, so that they can stand beside others of as many; None for all there are.

    Raises:
        UserError: one of the sets is nearly empty.
    """
    kd = kernel_distance(real, generated)
    size = min(len(real), len(generated), most or len(real))
    some_real, some_generated = (x[torch.arange(size) * len(x) // size] for x in (real, generated))
    precision, recall = precision_recall(some_real, some_generated)
    return {
        "kd": kd.value,
        "kd_standard_error": kd.standard_error,
        "fd": frechet_distance(some_real, some_generated),
        "precision": precision,
        "recall": recall,
        "fd_pictures": size,
    }


class LinearClassifier:
    """Multinomial logistic regression on standardised features, fitted by L-BFGS.

    Args:
        features: (N, D).
        labels: (N,) int64.
        penalty: times the sum of the squared weights over D. 10 was the best of 8 values between 0.01 and 100 on a
            random tenth of emoji64x3's training pictures, by lite0: 80.4 % right.
    """

    def __init__(self, features: Tensor, labels: Tensor, penalty: float = 10.0) -> None:
        x = features.double()
        self.mean, self.std = x.mean(0), x.std(0).clamp_min(1e-6)
        x = self._standardise(x)
        self.weight = torch.zeros(int(labels.max()) + 1, x.shape[1], dtype=torch.float64, requires_grad=True)
        self.bias = torch.zeros(len(self.weight), dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS([self.weight, self.bias], max_iter=100, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            optimizer.zero_grad()
            value = F.cross_entropy(F.linear(x, self.weight, self.bias), labels)
            value = value + penalty * self.weight.square().sum() / x.shape[1]
            value.backward()
            return value

        optimizer.step(loss)

    def _standardise(self, features: Tensor) -> Tensor:
        return (features.double() - self.mean) / self.std

    @torch.no_grad()
    def accuracy(self, features: Tensor, labels: Tensor) -> float:
        """Share of the features (M, D) that are taken for their labels (M,)."""
        predicted = F.linear(self._standardise(features), self.weight, self.bias).argmax(1)
        return float((predicted == labels).double().mean())
