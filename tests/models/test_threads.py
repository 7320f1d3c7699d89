"""Several threads on one model: each gets what it gets alone, while a probe looks into the memories."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from tiny import ids, small
from titans.models import probe_memories


@pytest.mark.parametrize("variant", ["MAC", "MAG"])
def test_eight_threads_on_one_model_get_what_each_gets_alone(variant):
    model = small(variant, n_layers=1).eval()

    def work(seed):
        tokens = ids(1 + seed % 3, 9 + seed, seed)
        with torch.no_grad():
            first = model(tokens)
            second = model(tokens, state=first.state)
            continued = model.generate(tokens, max_new_tokens=6, temperature=0.0)
            states = first.state.fork(2).reset([0]).put([1], second.state.select([0]))
            third = model(tokens[:1].expand(states.rows, -1), state=states)
        return first.logits, second.logits, continued, third.logits

    alone = [work(seed) for seed in range(8)]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(work, [*range(8)] * 3))
    for number, results in enumerate(together):
        assert all(map(torch.equal, results, alone[number % 8]))


def test_a_probe_disturbs_nobody_and_nobody_the_probe():
    model = small("MAC", n_layers=1).eval()
    with torch.no_grad():
        expected, state = model(ids()).logits, model(ids()).state
        readings = [probe_memories(model, ids()), probe_memories(model, ids(), state)]

        def use(_):
            return torch.equal(model(ids()).logits, expected)

        def probe(_):
            return [probe_memories(model, ids()), probe_memories(model, ids(), state)] == readings

        with ThreadPoolExecutor(4) as pool:
            results = [pool.submit(work, i) for i in range(12) for work in (use, probe)]
            assert all(result.result() for result in results)
    with pytest.raises(ValueError, match="another configuration"):
        probe_memories(model, ids(), small("MAC", n_layers=1, conv_kernel=0)(ids()).state)
