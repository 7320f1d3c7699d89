"""Do ℓp biases and ℓq retention help when keys collide or are noisy? The keys of a stream share a common part.

MIRAS §5.2 motivates Moneta with a more expressive objective and a harder retention. Its two halves run alone as well.
"""

from experiments.framework import Column, Experiment, Figures, Workplace
from experiments.vector_recall import VectorTask, by_rule, recall_unit
from titans.miras import GradientDescent, Lp, LqRetention, MirasConfig, WeightDecay

SIMILARITIES = (0, 0.5, 0.75, 0.9)
NOISES = (0.5, 1, 2)


def arms(scale: str) -> dict[str, VectorTask]:
    """Moneta, its two halves, and the Titans rule with and without momentum."""
    conditions = {
        **{f"similar@{s:g}": {"similarity": s} for s in SIMILARITIES},
        **{f"noisy@{n:g}": {"noise": n} for n in NOISES},
    }
    plain = MirasConfig(retention=WeightDecay(), algorithm=GradientDescent())
    rules = {
        "titans": MirasConfig.titans(),
        "l2": plain,
        "lp-3": plain.model_copy(update={"bias": Lp(p=3)}),
        "lp-1.5": plain.model_copy(update={"bias": Lp(p=1.5)}),
        "lq-4": plain.model_copy(update={"retention": LqRetention(q=4)}),
        "moneta": MirasConfig.moneta(),
        "steady": MirasConfig.steady(),
    }
    return by_rule(rules, scale, conditions)


def unit(task: VectorTask, seed: int, place: Workplace) -> Figures:
    """As ``recall_unit``; the conditions name their own kind of figure."""
    return {name.removeprefix("accuracy@"): value for name, value in recall_unit(task, seed, place).items()}


EXPERIMENT = Experiment(
    name="recall-collisions",
    purpose="Recall of vectors with similar keys and with noisy keys: Moneta and its halves against l2.",
    arms=arms,
    unit=unit,
    columns={
        "similar": Column("right answers", ".1%", "cosine between keys"),
        "noisy": Column("right answers", ".1%", "noise on the keys"),
    },
    note="16 pairs shown again and again in random order; training draws from all conditions. Noise is relative to a "
    "key's length. Chance is 6 %.",
)
