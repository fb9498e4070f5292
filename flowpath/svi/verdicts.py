"""What a fit is worth, in plain words, and what to do next where it is bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from flowpath.svi.climbing import Judgement

TRUSTED = 0.7  # k-hat from which on importance weights have no usable variance


def verdict(j: Judgement, others: Sequence[Mapping[str, float]] = (), missed: float = 0.0) -> str:
    """One line on a judgement, the worst finding first.

    Args:
        j: of fresh draws.
        others: the fits of other seeds: elbo, and how far `apart` a mean is, in sds.
        missed: mass, in units of what the flow covers, of modes that were seen and that it does not reach.
    """
    for finding in (_missed(missed), _disagreement(j, others), _nonfinite(j), _heavy(j), _off(j)):
        if finding:
            return finding
    return _good(j)


def _missed(share: float) -> str:
    if share < 0.01:
        return ""
    return (
        f"another mode with about {share:.2g} times the mass of this one was seen on the way and is not covered: the "
        "posterior has several modes; constrain or reparameterise the model, or fit each by init= and weigh them by "
        "log_evidence"
    )


def _disagreement(j: Judgement, others: Sequence[Mapping[str, float]]) -> str:
    far = [o for o in others if o["apart"] > 0.2 or abs(o["elbo"] - j.elbo) > 0.5]
    if not far:
        return ""
    return (
        f"two seeds disagree (ELBO {far[0]['elbo']:.2f} and {j.elbo:.2f}, a mean by {far[0]['apart']:.1f} sd): "
        "the posterior may have several modes; reparameterise the model, or compare with refine(time_limit)"
    )


def _nonfinite(j: Judgement) -> str:
    if j.nonfinite <= 0.001:
        return ""
    return (
        f"log p is not finite at {j.nonfinite:.2%} of the flow's draws: check the model's likelihood there "
        "(overflow, a Cholesky factor that fails), or pass init= near the posterior"
    )


def _heavy(j: Judgement) -> str:
    if j.khat < TRUSTED:
        return ""
    return (
        f"k-hat {j.khat:.2f}: importance weights are not to be trusted and the draws may miss the tails; train "
        "longer (max_steps=, time_limit=), reparameterise the model, or use refine(time_limit)"
    )


def _off(j: Judgement) -> str:
    """A low k-hat alone is no fit: a flow that is too wide has one."""
    if j.ess >= 0.1 and j.gap <= 1.0:
        return ""
    return (
        f"k-hat {j.khat:.2f}, but ESS {j.ess:.0%} and KL about {j.gap:.1f} nats: raw draws are not the "
        "posterior's; use corrected draws with care, train longer, or use refine(time_limit)"
    )


def _good(j: Judgement) -> str:
    numbers = f"(KL about {max(j.gap, 0.0):.3f} nats, k-hat {j.khat:.2f}, ESS {j.ess:.0%})"
    if j.gap >= 0.1:
        return f"the flow is near the posterior {numbers}, its raw draws visibly off it: use corrected ones"
    word = "very close to" if j.gap < 0.02 and j.khat < 0.5 else "close to"
    return (
        f"the flow is {word} the posterior as far as its own draws can tell {numbers}; a mode that no draw came near "
        "would not show"
    )
