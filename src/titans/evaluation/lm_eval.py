"""The model ``titans`` for EleutherAI's lm-eval: its rolling likelihood carries the memory through a whole document.

``python -m titans.evaluation.lm_eval --model titans --model_args pretrained=FOLDER --tasks ...`` is lm-eval's own
command with this model known to it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lm_eval.api.registry import register_model  # type: ignore[import-not-found]
from lm_eval.models.huggingface import HFLM  # type: ignore[import-not-found]

import titans.hf  # noqa: F401  makes the Auto classes know our folders
from titans.evaluation.grafted import GraftedModel
from titans.evaluation.perplexity import nats_of_rows
from titans.evaluation.reading import READ_AT_ONCE
from titans.models import TitansModel

if TYPE_CHECKING:
    from lm_eval.api.instance import Instance  # type: ignore[import-not-found]

_Base: Any = HFLM  # lm-eval's decorators hide what kind of class it is


@register_model("titans")
class TitansLM(_Base):
    """lm-eval's model for transformers, but a document's likelihood is read in pieces, the state going from each to
    the next: memory as for one piece, and nothing forgotten at its end.

    Args:
        pretrained: folder of a model of ours or of a grafted decoder.
        kwargs: lm-eval's for its ``hf`` model, ``peft`` among them.

    Raises:
        ValueError: the folder holds a model without memory states to carry.
    """

    def __init__(self, pretrained: Any, **kwargs: Any):
        super().__init__(pretrained=pretrained, **kwargs)
        ours = (
            module for module in self.model.modules() if isinstance(module, TitansModel)
        )  # in an adapter's wraps too
        self.reader: Any = next(ours, None) or GraftedModel(self.model)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Log likelihood in nats of each request's text, after the token that begins documents."""
        found = []
        for request in requests:
            (text,) = request.args
            told = -self.nats(text)
            self.cache_hook.add_partial("loglikelihood_rolling", (text,), told)
            found.append(told)
        return found

    def nats(self, text: str) -> float:
        """Nats of a text's tokens, each predicted from all before it."""
        import torch

        segment = max(1, READ_AT_ONCE // self.reader.config.segment) * self.reader.config.segment
        ids = torch.tensor([[self.prefix_token_id, *self.tok_encode(text)]], device=self.device)
        return 0.0 if ids.shape[1] < 2 else nats_of_rows(self.reader, ids, segment=segment)[0].sum().item()


def main() -> None:
    """lm-eval's command line."""
    from lm_eval.__main__ import cli_evaluate  # type: ignore[import-not-found]

    cli_evaluate()


if __name__ == "__main__":
    main()
