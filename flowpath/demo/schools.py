"""Eight schools: effects of coaching on a test, each with its standard error, and a model that pools them in part.

The data and the model are those of "Bayesian Data Analysis" (Gelman et al., 3rd edition 2013, section 5.5), first
analysed by Rubin (1981). In the form used here the density has no mode: it grows without bound as tau goes to 0.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowpath import _pyro  # noqa: F401  before Pyro

# isort: split
import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from flowpath.svi.posterior import Posterior

EFFECTS = (28.0, 8.0, -3.0, 7.0, -1.0, 1.0, 18.0, 12.0)
ERRORS = (15.0, 10.0, 16.0, 11.0, 9.0, 11.0, 10.0, 18.0)

_DATA, _RAW, _FITTED = "0.35", "0.75", "tab:red"


def model(errors: Tensor, effects: Tensor | None = None) -> None:
    """Each school has an effect theta ~ N(mu, tau), seen with a known standard error."""
    mu = pyro.sample("mu", dist.Normal(0.0, 5.0))
    tau = pyro.sample("tau", dist.HalfCauchy(5.0))
    with pyro.plate("schools", len(errors)):
        theta = pyro.sample("theta", dist.Normal(mu, tau))
        pyro.sample("effect", dist.Normal(theta, errors), obs=effects)


def data() -> tuple[Tensor, Tensor]:
    """Standard errors and effects, `(8,)` each: what `model` takes."""
    return torch.tensor(ERRORS), torch.tensor(EFFECTS)


def figure(posterior: Posterior) -> Figure:
    """Left the schools, as seen and as the posterior has them; right tau against mu, where the funnel is."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(9.0, 3.4), layout="constrained")
    left, right = fig.subplots(1, 2)
    _schools(left, posterior)
    _funnel(right, posterior)
    return fig


def _schools(axes: Axes, posterior: Posterior) -> None:
    errors, effects = (x.numpy() for x in data())
    place = torch.arange(8.0).numpy()
    theta = posterior.summary()["theta"]
    middle = theta["50%"].numpy()
    spread = torch.stack([theta["50%"] - theta["5%"], theta["95%"] - theta["50%"]]).numpy()
    axes.errorbar(effects, place - 0.12, xerr=1.645 * errors, fmt="o", ms=4, color=_DATA, label="seen, 90 %")
    axes.errorbar(middle, place + 0.12, xerr=spread, fmt="o", ms=4, color=_FITTED, label="posterior, 90 %")
    axes.set(yticks=place, yticklabels="ABCDEFGH", xlabel="effect of coaching", ylabel="school")
    axes.invert_yaxis()
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="lower center", bbox_to_anchor=(0.5, 1.0))


def _funnel(axes: Axes, posterior: Posterior) -> None:
    for corrected, colour, word in ((False, _RAW, "the flow's draws"), (True, _FITTED, "corrected")):
        draws = posterior.sample(2000, corrected=corrected, seed=0)
        theta, tau = draws["theta"][:, 0].numpy(), draws["tau"].numpy()
        axes.plot(theta, tau, ".", ms=2, color=colour, alpha=0.5, label=word)
    axes.set(yscale="log", xlabel="effect of school A", ylabel="tau", ylim=(0.02, 60))
    axes.legend(frameon=False, fontsize=8, ncols=2, markerscale=4, loc="lower center", bbox_to_anchor=(0.5, 1.0))
