"""The knapsack behind an allocation, solved exactly: the choices of least loss whose cost is within a limit.

Layers are decided one after the other, the largest first. Of the partial allocations only
those go on that no other beats in both loss and cost, and whose bound is below the loss of the
best allocation known. The bound is Lagrange's: give cost a price, and an allocation within the
limit loses at least what is left when each layer takes what is cheapest for it, loss and price
together, and the price of the limit is taken off. It holds at every price, and is looked at for
several near the one at which it is greatest. What is cheapest at each price also completes each
partial allocation, so that a very good one is known early. Nothing is dropped that could be better.

A general solver of integer programs takes longer, and holds limit and optimum to a tolerance only.
"""

from __future__ import annotations

import numpy as np

_MULTIPLES = np.array([1, *(1 + sign * 0.5**i for i in range(8) for sign in (1, -1)), 4, 10])
"""the prices that are looked at, as multiples of the one with the greatest bound, which comes first"""
_ROUNDING = 1e-12
"""Losses that differ by this share are equal: sums of floats are not more exact."""
_MOST = 100_000
"""Partial allocations that go on at most, evenly over their costs; of torchvision's networks none needs a fifth of it.
There are more only where dozens of layers have nearly, but not quite, the same size, and losses in proportion to it:
then the allocation is a good one that is not proven to be the best."""


def solve(loss: np.ndarray, cost: np.ndarray, starts: np.ndarray, mixing: np.ndarray, limit: int) -> np.ndarray:
    """The choice of each unit, (U,) in W * A, of least loss within `limit`; the same on every call.

    `loss` (U, W, A) float64, none negative, and `cost` (U, W, A) int64 are those of each unit under
    each weight and activation choice, the cheapest first, all of which together must be within
    `limit`. A layer's units, from its place in `starts` (L,) to the next, take the same activation
    choice; where their weight choices differ, the layer costs as much more as `mixing` (L,) says.
    """
    prices = _price(loss, cost, starts, mixing, limit) * _MULTIPLES
    chosen = _cheapest(prices, loss, cost, starts, mixing)
    losses, costs = _sums(chosen, loss, cost, starts, mixing)
    order = np.argsort(-np.add.reduceat(cost.max((1, 2)), starts), kind="stable")
    later_loss, later_cost = _tails(losses[:, order]), _tails(costs[:, order])
    ends = np.append(starts[1:], len(loss))

    bound = losses[0].sum() + prices[0] * (costs[0].sum() - limit)
    known, best = loss[:, 0, 0].sum(), np.zeros(len(loss), int)
    lost, spent = np.zeros(1), np.array([-limit])
    steps: list[tuple[slice, np.ndarray, np.ndarray]] = []
    for place in range(len(starts) + 1):
        whole_loss, whole_cost = lost[:, None] + later_loss[place], spent[:, None] + later_cost[place]
        within = np.where(whole_cost <= 0, whole_loss, np.inf)
        if within.min() < known:
            state, price = np.unravel_index(within.argmin(), within.shape)
            known, best = within[state, price], chosen[price].copy()
            for units, parents, picks in reversed(steps):
                best[units], state = picks[state], parents[state]
        left = np.flatnonzero((whole_loss + prices * whole_cost).max(1) < known * (1 - _ROUNDING))
        if place == len(starts) or not len(left):
            break
        units = slice(starts[order[place]], ends[order[place]])
        layer = order[place]
        least = losses[0, layer] + prices[0] * costs[0, layer]
        picks, more_loss, more_cost = _ways(loss[units], cost[units], mixing[layer], prices[0], least, known - bound)
        lost = np.add.outer(lost[left], more_loss).ravel()
        spent = np.add.outer(spent[left], more_cost).ravel()
        kept = _undominated(lost, spent)
        if len(kept) > _MOST:
            kept = kept[np.linspace(0, len(kept) - 1, _MOST).astype(int)]
        lost, spent = lost[kept], spent[kept]
        steps.append((units, left[kept // len(picks)], picks[kept % len(picks)]))
    return best


def _price(loss: np.ndarray, cost: np.ndarray, starts: np.ndarray, mixing: np.ndarray, limit: int) -> float:
    """The price of cost with the greatest bound, at which the cheapest choices go from above the limit to below."""

    def at(price: float) -> tuple[float, int]:
        chosen = _cheapest(np.array([price]), loss, cost, starts, mixing)
        lost, spent = _sums(chosen, loss, cost, starts, mixing)
        return float(lost.sum()), int(spent.sum())

    price, above, below = 0.0, at(0.0), (float(loss[:, 0, 0].sum()), int(cost[:, 0, 0].sum()))
    for _ in range(100 if above[1] > limit else 0):  # ends after a dozen; any price will do
        price = (below[0] - above[0]) / (above[1] - below[1])
        now = at(price)
        if now in (above, below):
            break
        above, below = (now, below) if now[1] > limit else (above, now)
    return price


def _cheapest(
    prices: np.ndarray, loss: np.ndarray, cost: np.ndarray, starts: np.ndarray, mixing: np.ndarray
) -> np.ndarray:
    """At each of `prices` (J,), the choices (J, U) of least loss and price, each layer by itself.

    That is for each unit its own cheapest, or, where that mixes and the price of mixing is above what it saves, the
    same for all units.
    """
    priced = loss + prices[:, None, None, None] * cost
    weights, least = priced.argmin(2), np.add.reduceat(priced.min(2), starts, axis=1)
    units = np.diff(starts, append=len(loss))
    if mixing.any():
        least += prices[:, None, None] * mixing[:, None] * _mixed(weights, starts)
        same = np.add.reduceat(priced, starts, axis=1)
        alike = np.repeat(same.min(2) < least, units, axis=1)
        weights = np.where(alike, np.repeat(same.argmin(2), units, axis=1), weights)
        least = np.minimum(same.min(2), least)
    activation = np.repeat(least.argmin(2), units, axis=1)
    return np.take_along_axis(weights, activation[:, :, None], axis=2)[:, :, 0] * loss.shape[2] + activation


def _mixed(weights: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """Whether the units of a layer differ in their weight choices (J, U, ...), as (J, L, ...)."""
    found: np.ndarray = np.maximum.reduceat(weights, starts, axis=1) > np.minimum.reduceat(weights, starts, axis=1)
    return found


def _sums(
    chosen: np.ndarray, loss: np.ndarray, cost: np.ndarray, starts: np.ndarray, mixing: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Loss and cost (J, L) of each layer at the choices (J, U)."""
    losses, costs = (np.add.reduceat(_taken(table, chosen), starts, axis=1) for table in (loss, cost))
    return losses, costs + mixing * _mixed(chosen // loss.shape[2], starts) if mixing.any() else costs


def _taken(table: np.ndarray, chosen: np.ndarray) -> np.ndarray:
    """Of a (U, W, A) table, what is at the choices (J, U)."""
    return table.reshape(len(table), -1)[np.arange(len(table)), chosen]


def _tails(values: np.ndarray) -> np.ndarray:
    """Sums from each place on of (J, L), as (L + 1, J)."""
    return np.pad(values[:, ::-1].cumsum(1)[:, ::-1], ((0, 0), (0, 1))).T


def _ways(
    loss: np.ndarray, cost: np.ndarray, mixing: int, price: float, least: float, room: float
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Undominated choices (K, G) of a layer of G units, with their loss (K,) and cost (K,).

    None of them has a unit whose choice alone raises the bound at `price`, to which the layer gives `least`, by more
    than `room`. Choices that are the same so far go on with the undominated ones: they may yet not mix.
    """
    priced = loss + price * cost
    cheapest = priced.min(1)
    rise = priced - cheapest[:, None] + (cheapest.sum(0) - least)
    found = []
    for activation in range(loss.shape[2]):
        picks, lost, spent = np.zeros((1, 0), int), np.zeros(1), np.zeros(1, int)
        for group in range(len(loss)):
            weights = np.flatnonzero(rise[group, :, activation] <= room)
            lost = np.add.outer(lost, loss[group, weights, activation]).ravel()
            spent = np.add.outer(spent, cost[group, weights, activation]).ravel()
            choices = np.tile(weights * loss.shape[2] + activation, len(picks))
            picks = np.column_stack([picks.repeat(len(weights), axis=0), choices])
            if not mixing:
                kept = _undominated(lost, spent)
            elif group < len(loss) - 1:
                kept = np.union1d(_undominated(lost, spent), np.flatnonzero(_alike(picks)))
            else:
                spent = spent + mixing * ~_alike(picks)
                kept = _undominated(lost, spent)
            picks, lost, spent = picks[kept], lost[kept], spent[kept]
        found.append((picks, lost, spent))
    picks, lost, spent = (np.concatenate(each) for each in zip(*found, strict=True))
    return picks, lost, spent


def _alike(picks: np.ndarray) -> np.ndarray:
    """Which choices (K, G) are the same for all units."""
    alike: np.ndarray = (picks == picks[:, :1]).all(1)
    return alike


def _undominated(loss: np.ndarray, cost: np.ndarray) -> np.ndarray:
    """Places of those (loss, cost) that no other has or betters in both, the least cost first."""
    by_cost = np.lexsort((loss, cost))
    least = np.minimum.accumulate(loss[by_cost])
    betters = np.ones(len(loss), bool)
    betters[1:] = least[1:] < least[:-1]
    return by_cost[betters]
