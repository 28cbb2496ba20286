"""Lock-step episodes are the environment, many times."""

import numpy as np

from graphprune.agents.episodes import Episodes
from graphprune.searching.environment import Observer, PruningEnv
from tests.agents.toys import problem


def test_same_observations_masks_and_ends_as_the_environment() -> None:
    made = problem(1, sizes=(3, 4, 2), limit=0.5, trials=50)
    judged: list[np.ndarray] = []
    many = Episodes(Observer(made), 6, lambda plans: (judged.append(plans), plans.sum(axis=1).astype(float))[1])
    single = [PruningEnv(made) for _ in range(6)]
    rng = np.random.default_rng(0)
    together = many.reset()
    alone = [env.reset()[0] for env in single]
    for step in range(3):
        masks = np.stack(many.env_method("action_masks"))
        assert (masks == np.stack([env.action_masks() for env in single])).all()
        for name, values in together.items():
            assert (values == np.stack([seen[name] for seen in alone])).all()
        actions = np.where(masks, rng.random(masks.shape), -1).argmax(axis=1)
        together, rewards, dones, _ = many.step(actions)
        answers = [env.step(action) for env, action in zip(single, actions, strict=True)]
        alone = [answer[0] for answer in answers]
        assert dones.tolist() == [answer[2] for answer in answers] == [step == 2] * 6
    assert (judged[0] == many.finished).all()
    assert [made.plan(row) for row in many.finished.tolist()] == [record.plan for record in made.records]
    assert (rewards == many.finished.sum(axis=1)).all()
    assert (together["site"] == 0).all()
    assert many.has_attr("action_masks")
