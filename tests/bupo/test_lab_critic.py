import pytest
import torch
from bupo.lab.answering import Answered
from bupo.lab.critic import Critic
from bupo.lab.subject import Lesson, make_model

from entropylens.responses import Response

RESPONSES = (
    Response((7, 8, 9), (10, 11, 12, 13)), Response((7, 8, 9), (11, 1)),
    Response((9, 4), (12, 13, 1)), Response((9, 4), (1,)),
)  # fmt: skip
REWARDS = torch.tensor([[1.0, 0.0], [0.0, 1.0]])


def critic_of(model, lr=1e-3):
    return Critic(model, lr=lr, weight_decay=0.0, max_grad_norm=1.0, updates=2, seed=3)


@pytest.fixture
def model():
    return make_model(Lesson(seed=0, layers=2, width=32))


def masks(responses):
    width = max(it.num_tokens for it in responses)
    return torch.tensor(
        [[int(place < it.num_tokens) for place in range(width)] for it in responses]
    )


def test_a_value_belongs_to_the_state_that_a_token_is_drawn_in(model):
    critic = critic_of(model)
    with torch.no_grad():
        found = critic.values(RESPONSES)
        for row, response in enumerate(RESPONSES):
            ids = torch.tensor([[*response.prompt_ids, *response.response_ids]])
            states = model.model(ids[:, :-1]).last_hidden_state[0, len(response.prompt_ids) - 1 :]
            head = critic.model.score
            expected = (states @ head.weight.T + head.bias)[:, 0]
            count = response.num_tokens
            torch.testing.assert_close(found[row, :count], expected)
            assert not found[row, count:].any()


def test_advantages_are_rewards_above_values_whitened(model):
    """With no discount and lambda 1 (veRL's defaults) GAE is the return less the value."""
    critic, mask = critic_of(model), masks(RESPONSES)
    with torch.no_grad():
        above = (REWARDS.flatten()[:, None] - critic.values(RESPONSES))[mask.bool()].double()
    expected = (above - above.mean()) / (above.var(correction=1) + 1e-8).sqrt()
    found = critic.advantages(Answered(RESPONSES, REWARDS), mask)[mask.bool()].double()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_values_come_to_foresee_the_rewards(model):
    critic, mask = critic_of(model, lr=1e-2), masks(RESPONSES)
    weights = {name: it.clone() for name, it in model.state_dict().items()}
    for _ in range(60):
        critic.advantages(Answered(RESPONSES, REWARDS), mask)
    with torch.no_grad():
        error = (critic.values(RESPONSES) - REWARDS.flatten()[:, None])[mask.bool()]
    # Answers to a prompt share their first state, whose value can only be the mean of both.
    assert error.abs().mean() < 0.3
    assert all(torch.equal(it, weights[name]) for name, it in model.state_dict().items())
