"""Learning: resumable to the bit, averaged, and stopped when it goes wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from pnp_batch.errors import PnpError
from pnp_batch.shapes.learning import SILENT, Recipe, Watch, is_half_faster, learn

RECIPE = Recipe(steps=12, learning_rate=0.05, warm_up=2)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 1))


def loss_of(net: nn.Module, step: int) -> Tensor:
    inputs = torch.randn(16, 4, generator=torch.Generator().manual_seed(step))
    return (net(inputs)[:, 0] - inputs.sum(1)).square().mean()


def learnt(
    folder: Path, recipe: Recipe = RECIPE, fail_at: int | None = None, watch: Watch = SILENT
) -> dict[str, Tensor]:
    net = network()

    def loss(step: int) -> Tensor:
        if step == fail_at:
            raise KeyboardInterrupt
        return loss_of(net, step)

    learn("toy", net, loss, recipe, folder, watch, seconds=0)
    return net.state_dict()


def test_an_interrupted_training_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    undisturbed = learnt(tmp_path / "a")
    for step in (3, 7):
        with pytest.raises(KeyboardInterrupt):
            learnt(tmp_path / "b", fail_at=step)
    resumed = learnt(tmp_path / "b", fail_at=2)  # which is behind it by now
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


def test_it_learns(tmp_path: Path) -> None:
    before, net = loss_of(network(), 99), network()
    learn("toy", net, lambda step: loss_of(net, step), Recipe(steps=300, learning_rate=0.02), tmp_path)
    assert loss_of(net, 99) < before / 10


def test_what_is_shown_and_kept_is_the_average(tmp_path: Path) -> None:
    net, shown = network(), []
    watch = Watch(SILENT.say, lambda step: shown.append((step, net[0].weight.detach().clone())), every=5)
    learn("toy", net, lambda step: loss_of(net, step), RECIPE, tmp_path / "a", watch)
    assert [step for step, _ in shown] == [5, 10]
    plain = network()
    recipe = Recipe(steps=5, learning_rate=0.05, warm_up=2, average=0)
    learn("toy", plain, lambda step: loss_of(plain, step), recipe, tmp_path / "b")
    assert not torch.allclose(shown[0][1], plain[0].weight)


def test_a_loss_that_is_not_finite_stops_it(tmp_path: Path) -> None:
    net = network()
    with pytest.raises(PnpError, match="loss of toy is not finite at step 0"):
        learn("toy", net, lambda step: loss_of(net, step) * float("nan"), RECIPE, tmp_path)


def test_the_learning_rate_rises_and_falls() -> None:
    rates = [Recipe(steps=100, learning_rate=1.0, warm_up=10, final=0.1).rate(step) for step in range(100)]
    assert rates[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.01)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resumed_training_computes_in_the_dtype_it_began_with(tmp_path: Path, dtype: str) -> None:
    net, said = network().eval(), []

    def measured(folder: Path) -> bool:
        return is_half_faster("toy", lambda step: loss_of(net, step), torch.device("cpu"), folder, said.append)

    found = measured(tmp_path)
    kept = (tmp_path / "toy.dtype").read_text()
    assert kept == ("bfloat16" if found else "float32")
    (tmp_path / "toy.dtype").write_text(dtype)  # whatever a second measurement would find
    assert measured(tmp_path) == (dtype == "bfloat16")
    assert len(said) == 1
