"""The linear recurrence S_t = η_t S_{t-1} + u_t over time: a loop, and a log-depth associative scan."""

import torch
from torch import Tensor


def reference_scan(gates: Tensor, inputs: Tensor, initial: Tensor | None = None) -> Tensor:
    """The definition of :func:`parallel_scan`, token by token, with the same arguments."""
    _check_arguments(gates, inputs, initial)
    state = torch.zeros_like(inputs[:, 0]) if initial is None else initial
    states = []
    for t in range(inputs.shape[1]):
        state = gates[:, t] * state + inputs[:, t]
        states.append(state)
    return torch.stack(states, dim=1)


def parallel_scan(gates: Tensor, inputs: Tensor, initial: Tensor | None = None) -> Tensor:
    """Solve ``S_t = gates_t * S_{t-1} + inputs_t`` for all t, in O(T) work and O(log T) depth.

    Only products and sums of the gates occur, no logarithm and no division: values and gradients are exact at gates of
    0 and 1.

    Args:
        gates: η, [B, T, D] or [B, T, 1], any value; in [0, 1] for a stable recurrence.
        inputs: u, [B, T, D], T >= 1.
        initial: S_0, [B, D]. None: zeros.

    Returns:
        S_1 .. S_T, [B, T, D].

    Raises:
        ValueError: A shape does not fit.

    Source: Titans §3.2, Eq. 18 (momentum as an associative scan); Blelloch 1990.
    """
    _check_arguments(gates, inputs, initial)
    if initial is not None:
        first = gates[:, :1] * initial[:, None] + inputs[:, :1]
        inputs = torch.cat([first, inputs[:, 1:]], dim=1)
    return _scan(gates, inputs)


def _scan(gates: Tensor, inputs: Tensor) -> Tensor:
    """Join tokens two by two, scan the T // 2 pairs, and step from each pair's state to the token after it."""
    T = inputs.shape[1]
    if T == 1:
        return inputs
    paired = T - T % 2
    second_gates = gates[:, 1::2]
    after_pair = _scan(gates[:, 0:paired:2] * second_gates, second_gates * inputs[:, 0:paired:2] + inputs[:, 1::2])
    between = gates[:, 2::2] * after_pair[:, : (T - 1) // 2] + inputs[:, 2::2]
    between = torch.cat([inputs[:, :1], between], dim=1)
    interleaved = torch.stack([between[:, : T // 2], after_pair], dim=2).flatten(1, 2)
    return torch.cat([interleaved, between[:, T // 2 :]], dim=1)


def _check_arguments(gates: Tensor, inputs: Tensor, initial: Tensor | None) -> None:
    if inputs.ndim != 3 or inputs.shape[1] == 0:
        raise ValueError(f"inputs must be [B, T, D] with T >= 1, got {list(inputs.shape)}")
    B, T, D = inputs.shape
    if gates.shape not in ((B, T, D), (B, T, 1)):
        raise ValueError(f"gates must be [{B}, {T}, {D}] or [{B}, {T}, 1] to fit inputs, got {list(gates.shape)}")
    if initial is not None and initial.shape != (B, D):
        raise ValueError(f"initial must be [{B}, {D}] to fit inputs, got {list(initial.shape)}")
