"""Do robust biases recall through outliers? A share of the values shown is replaced by noise ten times their size.

MIRAS §5.2 motivates Yaad with this. All arms but the first write without momentum, so that only the bias differs.
"""

from experiments.framework import Column, Experiment
from experiments.vector_recall import VectorTask, by_rule, recall_unit
from titans.miras import L2, Bias, GradientDescent, Huber, Lp, MirasConfig, Robust, WeightDecay

SHARES = (0, 10, 20, 30, 40)  # percent
BIASES: dict[str, Bias] = {
    "l2": L2(),
    "yaad": Huber(delta="learned", form="mixture"),
    "huber-vector": Huber(delta="learned", form="vector"),
    "huber-coordinate": Huber(delta="learned", form="coordinate"),
    "lp-1.5": Lp(p=1.5),
    "robust": Robust(radius=1.0),
}


def arms(scale: str) -> dict[str, VectorTask]:
    """One arm per bias, and the Titans rule with its momentum."""
    conditions = {str(share): {"outliers": share / 100} for share in SHARES}
    rules = {"titans": MirasConfig.titans()}
    for name, bias in BIASES.items():
        rules[name] = MirasConfig(bias=bias, retention=WeightDecay(), algorithm=GradientDescent())
    return by_rule(rules, scale, conditions)


EXPERIMENT = Experiment(
    name="recall-outliers",
    purpose="Recall of vectors while 0 to 40 % of the values shown are outliers: l2 against the robust biases.",
    arms=arms,
    unit=recall_unit,
    columns={"accuracy": Column("right answers", ".1%", "outliers %")},
    note="16 pairs shown again and again in random order; training draws from all five shares. Chance is 6 %.",
)
