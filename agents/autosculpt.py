"""AutoSculpt: a graph attention network picks a pattern for each site, trained by masked PPO.

Jing et al. 2024, arXiv 2412.18091. From the paper: a GATv2 encoder with 8 heads and mean pooling over the model graph,
a pattern embedding, PPO with clip 0.2, accuracy rewarded inside 5 % of the budget. Ours: real node and edge features,
logits as a score of (node, graph, pattern) embeddings so that one policy serves any model, an action wall instead of
missed budgets, gamma 1 (the paper's 0.9 would hide the end of a long episode), and four ways to spend few evaluations:

- the policy comes trained (`benchmarks/pretrain.py`: random small networks, machines and budgets, in imagination);
- it warms up in imagination, on episodes judged by the error table, before the first trial;
- later episodes are judged by a belief that every record corrects; plans already evaluated count as they were;
- some trials go to plans that are best for errors drawn from what is believed of them (Thompson 1933): fewer and fewer,
  since what is learnt at the end is of no use any more;
- each round evaluates the most promising of the policy's own plans, its greedy decode, and plans bred in imagination,
  generation by generation from the most promising ones: thoroughly, where sites are traded against each other and
  decided at a price of time, which finds what is believed to be best; and loosely, where the policy decides a few sites
  anew and some are set to any options, once from all that is known and once from plans drawn at random, because belief
  and policy that have made up their minds find no other way. What is open counts less and less as the trials are spent.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from sb3_contrib import MaskablePPO
from stable_baselines3.common.logger import Logger

from graphprune.agents.belief import EXPLORATION, Belief, promise
from graphprune.agents.encoder import ALL, PairPolicy, Sight
from graphprune.agents.episodes import Episodes
from graphprune.agents.policies import Learner, Weights, adopt, read_policy, reproducible, weights_of
from graphprune.agents.wall import only_plan
from graphprune.record import Record
from graphprune.searching.environment import FAILURE, Observer, excess
from graphprune.searching.problem import ROUNDING, Choices, Problem, Sum

EPISODES = 64
"""Episodes per PPO update."""
SHIPPED = Path(__file__).with_suffix(".safetensors")
"""What `benchmarks/pretrain.py` made."""
PRETRAINED = "pretrained"
WARM_UP = (10, 1.5, 40)
"""Updates in imagination before the first trial: at least, per site, at most."""
REFRESH = (4, 0.3, 10)
"""The same for the shipped policy."""
ROUNDS = 16
"""The trials are spent in about this many rounds, one PPO update each."""
STALLS = 4
"""The search ends after this many rounds in a row without a new plan."""
GENERATIONS = 12
"""How often a round's most promising plans are varied before any of them is evaluated."""
FIRST_GENERATIONS = 40
"""The same for the very first plan, of which nothing but the error table tells."""
ELITES = 16
"""How many of them live on from generation to generation."""
AT_ONCE = 8
"""How many sites a generation may open, over all of its variations: the policy is asked once for each."""
TRADERS, TRADES = 4, 64
"""How many of a generation's most promising plans are traded in, and for how many others each."""
PRICES = np.geomspace(1e-3, 1e3, 60)
"""Prices of time that are looked at, relative to error per cost from the dense to the cheapest plan."""
SPREAD = 0.3
"""Standard deviation of the logarithm of the prices at which plans are varied."""
DREAMS = 0.75
"""Share of a round's trials, at the beginning, that goes to plans for errors drawn from what is believed of them."""
LEAST_WRONG, LEAST_OFF = 0.01, 1e-4
"""A share of wrong answers, and a deviation of outputs, below which plans are not told apart."""
CURIOSITY = 0.5
"""Chance that an open site of a variation is drawn uniformly instead of from the policy, which soon is too sure."""
Vectors = NDArray[np.int64]


def merit(problem: Problem, record: Record, choices: Choices) -> float:
    """Minus the logarithm of how far off a plan is: a line over the logarithm of the layers' errors.

    That is the geometric mean of the share of wrong answers, which is what counts, and of the deviation of the outputs,
    which says more about alike plans; the former alone where outputs were not compared. What it overruns the target by,
    which every plan meets by prediction, is taken off.
    """
    if record.accuracy is None or record.error is not None:
        return -float(np.log(1 - FAILURE))
    wrong, over = 1 - record.accuracy, excess(problem, record, choices)
    if record.deviation is None:
        return -float(np.log(max(wrong + over, LEAST_WRONG)))
    return -over - float(np.log(max(wrong, LEAST_WRONG) * max(record.deviation, LEAST_OFF))) / 2


def fits(weights: Weights, problem: Problem) -> bool:
    """Whether a policy knows graphs with as many features as this one has; those made by hand may have others."""
    return bool(weights["features_extractor.encoder.embed.weight"].shape[1] == problem.graph.features.shape[1])


class AutoSculpt(Learner):
    """The main agent.

    `policy` is what it starts from: "pretrained" for the shipped one, the path of a file that `save_policy` wrote, or
    None for random weights. `sight` takes away parts of what the policy sees, for ablations; the shipped policy was
    trained with all of it and then is not used.
    """

    name = "autosculpt"

    def __init__(self, policy: str | Path | None = PRETRAINED, sight: Sight = ALL) -> None:
        super().__init__()
        self._sight = sight
        self._shipped = policy == PRETRAINED
        if policy is not None and not self._shipped:
            self.load_policy(policy)

    def _start(self, problem: Problem) -> tuple[Weights | None, tuple[int, float, int]]:
        """The weights to begin with, and how long to warm up.

        Weights that were loaded or are of the last run come first, then the shipped ones where they can be used.
        """
        if self._weights is None and self._shipped and self._sight == ALL:
            shipped = read_policy(SHIPPED)
            if fits(shipped, problem):
                return shipped, REFRESH
        return self._weights, WARM_UP

    def run(self, problem: Problem, rng: np.random.Generator) -> None:
        """Search until the trials are spent or no new plan turns up."""
        if (plan := only_plan(problem)) is not None:
            problem.evaluate(plan)
            return
        weights, (least, each, most) = self._start(problem)
        search = Search(problem, rng, weights, self._sight)
        try:
            search.warm_up(int(np.clip(each * len(problem.decisions), least, most)))
            search.spend()
        finally:
            self._weights = search.weights()


class Search:
    """One run: a policy, what it believes, and the plans it has tried."""

    def __init__(self, problem: Problem, rng: np.random.Generator, weights: Weights | None, sight: Sight = ALL) -> None:
        self.problem = problem
        self.rng = rng
        self.belief = Belief(problem)
        self.observer = Observer(replace(problem, error=self.belief.error))
        self.rewards: dict[Choices, float] = {}
        self.per_round = max(4, problem.trials // ROUNDS)
        self._sizes = np.array([len(decision.options) for decision in problem.decisions])
        self._changes = (
            np.repeat(np.arange(len(self._sizes)), self._sizes),
            np.concatenate(list(map(np.arange, self._sizes))),
        )
        self._tied = problem.inside | np.eye(len(problem.decisions), dtype=np.bool_)
        self.episodes = Episodes(self.observer, EPISODES, self.judge)
        with reproducible(rng):
            self.ppo = MaskablePPO(
                PairPolicy,
                self.episodes,
                learning_rate=3e-3,
                n_steps=self.observer.sites,
                batch_size=max(192, self.observer.sites * EPISODES // 4),
                n_epochs=4,
                gamma=1.0,
                gae_lambda=1.0,
                ent_coef=0.1,
                clip_range=0.2,
                policy_kwargs={"problem": problem, "sight": sight},
                device="cpu",
            )
            self.ppo.set_logger(Logger(None, []))
            if weights is not None:
                adopt(self.ppo.policy, weights)

    def weights(self) -> Weights:
        """The policy's parameters, which do not depend on the problem's size."""
        return weights_of(self.ppo.policy)

    def warm_up(self, updates: int) -> None:
        """Train in imagination."""
        for _ in range(updates):
            self._update()

    def _update(self) -> None:
        """One PPO update on `EPISODES` episodes."""
        with reproducible(self.rng):
            steps = self.observer.sites * EPISODES
            self.ppo.learn(steps, log_interval=None, reset_num_timesteps=False)

    def judge(self, plans: Vectors) -> NDArray[np.float64]:
        """Rewards of episodes: as evaluated where they were, as believed elsewhere; standardised over the batch."""
        believed, _ = self.belief.predict(plans)
        values = np.array(
            [self.rewards.get(tuple(plan), value) for plan, value in zip(plans.tolist(), believed, strict=True)]
        )
        standard: NDArray[np.float64] = (values - values.mean()) / (values.std() + 1e-6)
        return standard

    def spend(self) -> None:
        """Spend the trials, round by round, until none is left (BudgetSpent) or no new plan turns up."""
        stalls = 0
        undecided = np.full((1, self.observer.sites), -1, dtype=np.int64)
        as_tabled = self.first_plans(Belief(self.problem, power=1.0))
        self._try(as_tabled[[self.problem.error.batch(as_tabled).argmin()]], 1)
        self._try(self.first_plans(self.belief), 1)
        self._try(self.first_plans(self.belief, thorough=False), 1)
        while stalls < STALLS:
            self._update()
            tried = self._try(self.dreams(round(DREAMS * self.per_round * self.openness)), self.per_round)
            own = np.concatenate([self.decode(undecided, greedy=True), self.episodes.finished])
            wild = self.decode(np.repeat(undecided, EPISODES, axis=0), greedy=False, curiosity=1.0)
            known = np.concatenate([own, np.array(list(self.rewards))])
            bred = [
                self._breed(known, self.belief, thorough=True),
                self._breed(known, self.belief),
                self._breed(wild, self.belief),
            ]
            tried += self._try(np.concatenate([own, *bred]), self.per_round - tried)
            stalls = 0 if tried else stalls + 1

    def first_plans(self, belief: Belief, thorough: bool = True) -> Vectors:
        """The policy's own plans, and what is bred from them while nothing but the error table is known."""
        own = self.own_plans()
        return np.concatenate([own, self._breed(own, belief, FIRST_GENERATIONS, thorough)])

    def own_plans(self) -> Vectors:
        """The policy's greedy plan, then what it draws."""
        undecided = np.full((EPISODES, self.observer.sites), -1, dtype=np.int64)
        draws = self.decode(undecided, greedy=False, curiosity=0.0)
        return np.concatenate([self.decode(undecided[:1], greedy=True), draws])

    @property
    def exploration(self) -> float:
        """Deviations that count for a plan: fewer and fewer, since what is learnt at the end is of no use any more."""
        return EXPLORATION * self.openness

    @property
    def openness(self) -> float:
        """The share of the trials that is left."""
        return self.problem.remaining / max(self.problem.trials, 1)

    def dreams(self, count: int) -> Vectors:
        """Plans that are nearly the best for errors drawn from what is believed of them: at most [count, sites]."""
        found = [np.zeros((0, self.observer.sites), dtype=np.int64)]
        for _ in range(count):
            errors = self.belief.errors(self.rng.normal(size=len(self.problem.error.factors)))
            found.append(self._least(errors, self._at_prices(errors)[0]))
        return np.concatenate(found)

    def _least(self, errors: Sum, settled: Vectors) -> Vectors:
        """A plan [0 or 1, sites] with nearly the least of some errors: the best of some settled ones, then traded."""
        plans = self._legal(settled)
        best, least = plans[:0], np.inf
        while len(plans) and (lowest := float((sums := errors.batch(plans)).min())) < least * (1 - ROUNDING):
            best, least = plans[[sums.argmin()]], lowest
            plans = self._traded(best, errors)
        return best

    def _breed(self, plans: Vectors, belief: Belief, generations: int = GENERATIONS, thorough: bool = False) -> Vectors:
        """What becomes of some plans if, believed to be good, they are varied: [M, sites].

        Where that is thorough, they come to be the best that is believed in, and much alike; else they stay different.
        """
        errors = belief.errors(np.zeros(len(self.problem.error.factors)))
        settled, price = self._at_prices(errors) if thorough else (plans[:0], 0.0)
        bred = pool = np.unique(np.concatenate([plans, self._least(errors, settled)]), axis=0)
        for _ in range(generations):
            pool = pool[np.argsort(-promise(belief, pool, self.exploration), kind="stable")[:ELITES]]
            varied = [self._grafted(pool, plans)]
            if thorough:
                varied += [self._traded(pool[:TRADERS], errors), self._priced(pool, errors, price)]
            else:
                varied += [self._exchanged(pool), self.decode(self._opened(pool), greedy=False)]
            pool = np.unique(np.concatenate([pool, *varied]), axis=0)
            bred = np.concatenate([bred, pool])
        return bred

    def _opened(self, plans: Vectors) -> Vectors:
        """Plans drawn from some [M, sites] with one to three of `AT_ONCE` sites left open (-1): [2 EPISODES, sites].

        What is inside a branch is opened with it, since there is nothing to go back to where the branch was gone.
        """
        anchors = plans[self.rng.integers(len(plans), size=2 * EPISODES)]
        sites = self.rng.permutation(anchors.shape[1])[:AT_ONCE]
        for anchor in anchors:
            opened = self.rng.choice(sites, size=min(len(sites), int(self.rng.integers(1, 4))), replace=False)
            anchor[self._tied[opened].any(axis=0)] = -1
        return anchors

    def _grafted(self, plans: Vectors, donors: Vectors) -> Vectors:
        """Plans drawn from some [M, sites] in which one to three sites, and what is inside them, are as in donors."""
        grafted = plans[self.rng.integers(len(plans), size=2 * EPISODES)]
        for plan in grafted:
            sites = self.rng.integers(grafted.shape[1], size=int(self.rng.integers(1, 4)))
            taken = self._tied[sites].any(axis=0)
            plan[taken] = donors[self.rng.integers(len(donors)), taken]
        return self._legal(grafted)

    def _exchanged(self, plans: Vectors) -> Vectors:
        """Plans drawn from some [M, sites] with one or two sites set to any options, if that meets the target."""
        varied = plans[self.rng.integers(len(plans), size=8 * EPISODES)]
        for _ in range(2):
            sites = self.rng.integers(varied.shape[1], size=len(varied))
            varied[np.arange(len(varied)), sites] = (self.rng.random(len(varied)) * self._sizes[sites]).astype(np.int64)
        return self._legal(varied)

    def _traded(self, plans: Vectors, weighed: Sum) -> Vectors:
        """For each of some plans [N, sites] those with one site set to an option of less error and another, if need be,
        to a cheaper one, that lower the sum of errors most, where sites did not interact.
        """
        sites, options = self._changes
        errors = np.concatenate([weighed.sweep(plans, site, size) for site, size in enumerate(self._sizes)], axis=1)
        costs = np.concatenate([self.problem.sweep_overruns(plans, site) for site in range(len(self._sizes))], axis=1)
        overruns, nothing = self.problem.overruns(plans), len(sites)  # the number of the change that changes nothing
        same = options == plans[:, sites]
        errors = np.where(same, 0.0, errors - weighed.batch(plans)[:, None])
        costs = np.where(same, 0.0, costs - overruns[:, None])
        found = [plans[:0]]
        for plan, error, cost, room in zip(plans, errors, costs, 1 - overruns, strict=True):
            better, cheaper = np.flatnonzero(error < 0), np.append(np.flatnonzero(cost < 0), nothing)
            total = error[better][:, None] + np.append(error, 0.0)[cheaper]
            dear = cost[better][:, None] + np.append(cost, 0.0)[cheaper] > room
            total[dear | (sites[better][:, None] == np.append(sites, -1)[cheaper])] = 0.0
            if not total.size:
                continue
            best = np.argpartition(total, min(TRADES, total.size - 1), axis=None)[:TRADES]
            firsts, seconds = np.unravel_index(best[total.flat[best] < 0], total.shape)
            traded = np.repeat(plan[None], len(firsts), axis=0)
            for change in (better[firsts], cheaper[seconds]):
                (rows,) = np.nonzero(change != nothing)
                traded[rows, sites[change[rows]]] = options[change[rows]]
            found.append(traded)
        return self._legal(np.concatenate(found))

    def _priced(self, plans: Vectors, errors: Sum, price: float) -> Vectors:
        """Plans drawn from some [M, sites] in which some branches and sites are decided anew, each at a price of time.

        An exchange cannot bring a branch back: too many sites inside it have to become cheaper at once.
        """
        drawn = plans[self.rng.integers(len(plans), size=EPISODES)]
        share = self.rng.random((EPISODES, 1)) ** 2
        open_sites = (self.rng.random(drawn.shape) < share) @ self._tied
        prices = price * np.exp(SPREAD * self.rng.normal(size=EPISODES))
        return self._legal(self._settled(drawn, open_sites, prices, errors))

    def _settled(
        self, plans: Vectors, open_sites: NDArray[np.bool_], prices: NDArray[np.float64], errors: Sum
    ) -> Vectors:
        """Plans [N, sites] whose open sites [N, sites] one after another took the least error + price x cost, twice.

        Branches come last: it is known then what they would be worth if they stayed.
        """
        branches = self.problem.inside.any(axis=1)
        settled = np.where(open_sites & branches, 0, plans)
        for site in [*np.flatnonzero(~branches), *np.flatnonzero(~branches), *np.flatnonzero(branches)]:
            costs = self.problem.sweep_overruns(settled, site)
            totals = errors.sweep(settled, site, costs.shape[1]) + prices[:, None] * costs
            settled[:, site] = np.where(open_sites[:, site], totals.argmin(axis=1), settled[:, site])
        return settled

    def _at_prices(self, errors: Sum) -> tuple[Vectors, float]:
        """All sites settled at each of `PRICES` [prices, sites], and the least of these at which the target is met."""
        ends = np.array([self.problem.dense, self.problem.cheapest], dtype=np.int64)
        spans = [float(np.ptp(values)) for values in (errors.batch(ends), self.problem.overruns(ends))]
        prices = PRICES * max(spans[0], 1e-9) / max(spans[1], 1e-9)
        start = np.repeat(ends[:1], len(prices), axis=0)
        settled = self._settled(start, np.ones(start.shape, np.bool_), prices, errors)
        enough = self.problem.all_feasible(settled)
        return settled, float(prices[enough.argmax() if enough.any() else -1])

    def _legal(self, plans: Vectors) -> Vectors:
        """Those of some plans [N, sites] that meet the target, in their canonical form."""
        whole = self.problem.canonicals(plans)
        return whole[self.problem.all_feasible(whole)]

    def decode(self, anchors: Vectors, greedy: bool, curiosity: float = CURIOSITY) -> Vectors:
        """Let the policy decide the open sites (-1) of `anchors` [N, sites]; what then meets the target comes back.

        Unless greedy, it draws, and `curiosity` is the chance that an open site is drawn uniformly instead.
        """
        plans = anchors.copy()
        with reproducible(self.rng):
            for site in np.flatnonzero((anchors < 0).any(axis=0)).tolist():
                (rows,) = np.nonzero(anchors[:, site] < 0)
                plans[rows, site] = self._decide(plans[rows], site, greedy, curiosity)
        return self._legal(plans)

    def _decide(self, decided: Vectors, site: int, greedy: bool, curiosity: float) -> Vectors:
        """The policy's options for a site of choice vectors [N, sites]; unless greedy, some are drawn uniformly."""
        actions: Vectors
        masks = self.observer.open_masks(decided, site)
        actions, _ = self.ppo.predict(self.observer.observe(decided, site), deterministic=greedy, action_masks=masks)
        return actions if greedy else np.where(self.rng.random(len(actions)) < curiosity, self._any(masks), actions)

    def _any(self, masks: NDArray[np.bool_]) -> Vectors:
        """A legal action for each row of masks [N, options], drawn uniformly."""
        actions: Vectors = np.where(masks, self.rng.random(masks.shape), -1.0).argmax(axis=1)
        return actions

    def _try(self, plans: Vectors, count: int) -> int:
        """Evaluate the `count` most promising new plans, each chosen as if the others were known; returns how many.

        All of them meet the target by prediction: where a measurement says otherwise, by however much, it is noisy, and
        a reward of nothing would make plans like this one look bad. So there is no end to the band.
        """
        fresh = np.array(list(dict.fromkeys(plan for plan in map(tuple, plans.tolist()) if plan not in self.rewards)))
        if not len(fresh):
            return 0
        belief, chosen = self.belief, fresh[:0]
        for _ in range(min(count, len(fresh))):
            best = promise(belief, fresh, self.exploration).argmax()
            chosen = np.concatenate([chosen, fresh[[best]]])
            belief, fresh = belief.supposing(fresh[[best]]), np.delete(fresh, best, axis=0)
        values = []
        for plan in map(tuple, chosen.tolist()):
            self.rewards[plan] = merit(self.problem, self.problem.evaluate(plan), plan)
            values.append(self.rewards[plan])
        self.belief.learn(chosen, np.array(values))
        return len(chosen)
