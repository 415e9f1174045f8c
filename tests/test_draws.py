"""Random numbers that belong to samples: the counters, what draws from them, and that neither batch nor rank changes any."""

from __future__ import annotations

import math

import pytest
import torch
from models import batch, linear, one_thread, seed  # noqa: F401
from torch import Tensor, nn

import fastadv
from fastadv.attacks.draws import LENGTHS, Draws, integers_like, normal_like, uniform_like, uniform_start
from fastadv.objectives.mmc import mmc_distance
from fastadv.reference.step import philox

NUMBERS = torch.tensor([2**33 + 5, 0, 7, 2**63 - 1, 2**32, 1])
HALVES = torch.tensor([4, 1, 3]), torch.tensor([0, 5, 2])


def words(draws: Draws, step: int, size: int) -> Tensor:
    """[N, size], from the counters."""
    e, number = torch.arange(size).expand(len(draws), -1), draws.samples[:, None].expand(-1, size)
    block = philox(draws.key, e // 4, torch.full_like(e, step), number & 0xFFFFFFFF, number >> 32)
    return torch.stack(block, -1).gather(-1, (e % 4)[..., None])[..., 0]


# ------------------------------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("stream", [0, 1, 2, 3, 1 << 20])
def test_uniform_numbers_are_the_words_of_the_counters(stream, dtype):
    draws = Draws(2**63 - 6, NUMBERS, stream)
    for step in (0, 1, 5, LENGTHS, 2**32 - 1):
        for shape in ((), (1, 1), (5,), (3, 7, 9), (2, 8), (0,), (1030,)):
            expected = (words(draws, step, math.prod(shape)) >> 8).to(dtype).view(6, *shape) / 2**24
            u = draws.uniform(step, *shape, dtype=dtype)
            assert u.dtype == dtype
            assert torch.equal(u, expected)
            assert torch.equal(draws.uniform(torch.tensor(step), *shape, dtype=dtype), u)  # counted on the device


def test_a_key_has_64_bits():
    keys = [Draws(2**63 - 1, NUMBERS, stream).key for stream in range(9)]
    assert len(set(keys)) == 9
    assert max(keys) >= 2**63
    assert Draws(5, NUMBERS).key == 5


def test_no_samples_draw_nothing():
    assert Draws(0, NUMBERS[:0]).uniform(0, 3, 4).shape == (0, 3, 4)


def test_draws_compile_in_one_graph():
    def noise(x, samples, step):
        return normal_like(x, Draws(3, samples, 2), step) + Draws(3, samples, 2).uniform(step, *x.shape[1:])

    x, _ = batch()
    compiled = torch.compile(noise, fullgraph=True, backend="aot_eager")
    for step in (0, 4, 5):
        assert torch.equal(compiled(x, NUMBERS, step), noise(x, NUMBERS, step))


# ----------------------------------------------------------------------------------------------------------------- sources

X = {
    "image": torch.rand(6, 3, 5, 7),
    "channels_last": torch.rand(6, 3, 5, 7).to(memory_format=torch.channels_last),
    "row": torch.rand(6, 13),
    "number": torch.rand(6),
    "double": torch.rand(6, 3, 4).double(),
    "bf16": torch.rand(6, 3, 4).bfloat16(),
}
DRAWN = {
    "uniform_start": lambda x, source, step=0: uniform_start(x, 0.1, 0.0, 1.0, source, step),
    "uniform_like": uniform_like,
    "normal_like": normal_like,
    "integers_like": lambda x, source, step=0: integers_like(x, 1, 10, source, step),
}


@pytest.mark.parametrize("kind", X)
@pytest.mark.parametrize("function", DRAWN)
def test_what_a_sample_draws_is_its_own(function, kind):
    x, draw, draws, state = X[kind], DRAWN[function], Draws(11, NUMBERS, 1), torch.get_rng_state()
    whole = draw(x, draws, 3)
    assert whole.shape == x.shape
    assert whole.dtype == (torch.int64 if function == "integers_like" else x.dtype)
    for half in HALVES:
        assert torch.equal(draw(x[half], draws.rows(half), 3), whole[half])
        assert torch.equal(draw(x[half[:1]], draws.rows(half[:1]), 3), whole[half[:1]])
    for other in (draw(x, draws, 4), draw(x, draws.of_stream(2), 3), draw(x, Draws(12, NUMBERS, 1), 3)):
        assert not torch.equal(other, whole)
    assert torch.equal(torch.get_rng_state(), state)


def test_a_generator_draws_as_torch_does():
    x = X["image"]
    for here, there in ((seed(4), seed(4)), (None, None)):
        for drawn, expected in (
            (lambda g: normal_like(x, g, std=0.1), lambda g: torch.empty_like(x).normal_(std=0.1, generator=g)),
            (lambda g: uniform_like(x, g), lambda g: torch.empty_like(x).uniform_(generator=g)),
            (lambda g: integers_like(x, 1, 10, g), lambda g: torch.empty_like(x).long().random_(1, 10, generator=g)),
        ):
            torch.manual_seed(0)
            result = drawn(here)
            torch.manual_seed(0)
            assert torch.equal(result, expected(there))


def test_normal_numbers_are_normal_and_finite():
    z = normal_like(torch.empty(2000, 500), Draws(0, torch.arange(2000)), std=2.0).double() / 2
    size = z.numel()
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96)):
        assert abs(z.pow(power).mean() - moment) < 5 * math.sqrt(variance / size)
    assert abs((z[:, 1:] * z[:, :-1]).mean()) < 5 / math.sqrt(size)
    assert abs((z[1:] * z[:-1]).mean()) < 5 / math.sqrt(size)
    for threshold in (1.0, 3.0, 4.0):
        beyond = math.erfc(threshold / math.sqrt(2))
        assert abs((z.abs() > threshold).double().mean() - beyond) < 5 * math.sqrt(beyond / size)


def test_integers_are_uniform():
    counts = integers_like(torch.empty(300, 100), 1, 10, Draws(0, torch.arange(300))).flatten().bincount()
    assert len(counts) == 10
    assert counts[0] == 0
    assert ((counts[1:] - 30_000 / 9).abs() < 5 * math.sqrt(30_000 / 9)).all()


# ----------------------------------------------------------------------------------------------------- attacks, training


class RowByRow(nn.Module):
    """A linear model whose sums do not depend on how many images there are."""

    def __init__(self, classes: int = 10, features: int = 192) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(classes, features, generator=seed()) / 8)

    def forward(self, x: Tensor) -> Tensor:
        return (x.flatten(1)[:, None] * self.weight).sum(2)


def halves_equal_the_whole(call, x: Tensor, y: Tensor) -> None:
    """``call(x, y, draws) -> x_adv``, on all samples and on the two halves of them; torch's generator is left alone."""
    draws, state = Draws(3, NUMBERS, 5), torch.get_rng_state()
    whole = call(x, y, draws)
    for half in HALVES:
        assert torch.equal(call(x[half], y[half], draws.rows(half)), whole[half])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(call(x, y, draws), whole)
    assert not torch.equal(call(x, y, draws.of_stream(6)), whole)


SETTINGS = {
    "linf": {"eps": 0.1},
    "l2": {"eps": 1.0, "norm": "l2"},
    "l1": {"eps": 5.0, "norm": "l1"},
    "normal": {"eps": 0.1, "init": "normal", "loss": "kl"},
    "normal, returned": {"eps": 0.5, "norm": "l2", "init": "normal", "keep_best": True},
    "restarts": {"eps": 0.03, "restarts": 3},
    "l2 restarts": {"eps": 0.3, "norm": "l2", "restarts": 3, "early_stop": True},
}


@pytest.mark.parametrize("settings", SETTINGS)
def test_pgd_of_halves_is_that_of_the_whole(settings):
    model, (x, y) = RowByRow(), batch()
    attack = fastadv.PGD(model, steps=3, **SETTINGS[settings])

    def call(x, y, draws):
        attack.generator = draws
        return attack(x, y)

    halves_equal_the_whole(call, x, y)


def starts(norm: str, restarts: int = 1, count: int = 6) -> list[Tensor]:
    """The first images of each restart, in the ball of 1 about 0."""
    seen: list[Tensor] = []
    model = linear()

    def record(x: Tensor) -> Tensor:
        seen.append(x.detach().clone())
        return model(x)

    draws = Draws(0, torch.arange(count))
    attack = fastadv.PGD(record, 1.0, steps=1, norm=norm, restarts=restarts, bounds=None, generator=draws)
    attack(torch.zeros(count, 192), torch.zeros(count, dtype=torch.long))
    return seen[::2] if restarts > 1 else seen[:1]


@pytest.mark.parametrize("norm", ["linf", "l2", "l1"])
def test_each_restart_draws_anew(norm):
    first, *others = starts(norm, 3)
    assert torch.equal(starts(norm)[0], first)
    for a, b in ((first, others[0]), (first, others[1]), others):
        assert (torch.cosine_similarity(a, b).abs() < 0.5).all()
        length, other = (t.norm(1 if norm == "l1" else 2, dim=1) for t in (a, b))
        assert ((length - other).abs() > 1e-5).all()


@pytest.mark.parametrize("norm", ["l2", "l1"])
def test_lengths_are_uniform_and_say_nothing_of_the_direction(norm):
    (start,) = starts(norm, count=2000)
    length = start.double().norm(int(norm[1]), dim=1)
    assert length.max() < 1
    for power in (1, 2):
        assert abs(length.pow(power).mean() - 1 / (power + 1)) < 5 * 0.3 / math.sqrt(2000)
    first = start[:, 0].double() / length
    assert abs(torch.corrcoef(torch.stack([first, length]))[0, 1]) < 5 / math.sqrt(2000)


OBJECTIVES = {
    "PGDAT": fastadv.PGDAT,
    "TRADES": fastadv.TRADES,
    "an attack that is there": lambda: fastadv.TRADES(fastadv.TRADES.paper_attack(MODEL)),
    "FGSMRS": fastadv.FGSMRS,
    "NFGSM": fastadv.NFGSM,
    "RSTStability": fastadv.RSTStability,
    "MMC": lambda: fastadv.MMC(10),
    "Consistency": lambda: fastadv.Consistency(fastadv.PGDAT()),
}
MODEL = RowByRow()


@pytest.mark.parametrize("name", OBJECTIVES)
def test_training_images_of_halves_are_those_of_the_whole(name):
    x, y = batch()
    objective = OBJECTIVES[name]()

    def call(x, y, draws):
        objective.draw_from(draws)
        if name == "Consistency":  # of an even number of images
            views = Draws(draws.seed, torch.cat([draws.samples, draws.samples ^ 1 << 40]), draws.stream)
            objective.draw_from(views)
            return objective.adversarial(MODEL, torch.cat([x, x]), torch.cat([y, y]))[: len(x)]
        x_adv = objective(MODEL, x, y).x_adv
        assert torch.equal(objective.adversarial(MODEL, x, y), x_adv)
        return x_adv

    halves_equal_the_whole(call, x, y)


def test_an_objective_draws_from_what_it_was_given_last():
    x, y = batch()
    for objective in (fastadv.TRADES(), fastadv.MMC(10), fastadv.NFGSM(), fastadv.RSTStability()):
        for source in (seed(3), Draws(1, NUMBERS), None, seed(4)):
            objective.draw_from(source)
            before = torch.get_rng_state()
            objective(MODEL, x, y)
            assert torch.equal(torch.get_rng_state(), before) == (source is not None)
        first = (objective.draw_from(seed(4)), objective(MODEL, x, y).x_adv)[1]
        assert torch.equal((objective.draw_from(seed(4)), objective(MODEL, x, y).x_adv)[1], first)


def test_a_source_outlives_the_model():
    """The paper's attack is made for each model anew."""
    (x, y), objective, others = batch(), fastadv.PGDAT(), (RowByRow(), RowByRow())
    objective.draw_from(Draws(1, NUMBERS))
    first, second = (objective(model, x, y).x_adv for model in others)
    assert torch.equal(first, second)


def test_targets_say_nothing_of_the_starts():
    count, targets = 3000, []

    def loss(logits, y):
        targets.append(y)
        return mmc_distance(logits, y)

    objective = fastadv.MMC(10, fastadv.PGD(MODEL, 1.0, 0.0, 1, loss=loss, targeted=True, bounds=None))
    objective.draw_from(Draws(0, torch.arange(count)))
    start = objective.adversarial(MODEL, torch.zeros(count, 192), torch.zeros(count, dtype=torch.long))
    assert set(targets[0].tolist()) == set(range(1, 10))
    assert abs(torch.corrcoef(torch.stack([targets[0].double(), start[:, 0].double()]))[0, 1]) < 5 / math.sqrt(count)


@pytest.mark.parametrize("name", ["PGDAT", "MMC", "NFGSM", "RSTStability"])
def test_draws_of_other_samples_are_refused(name):
    x, y = batch()
    objective = OBJECTIVES[name]()
    for source, message in (
        (Draws(0, NUMBERS[:5]), r"generator must be Draws of x's 6 samples on cpu; got those of 5 on cpu"),
        (Draws(0, NUMBERS.to("meta")), r"generator must be Draws of x's 6 samples on cpu; got those of 6 on meta"),
    ):
        objective.draw_from(source)
        with pytest.raises(ValueError, match=message):
            objective(MODEL, x, y)


def test_what_is_no_source_is_refused():
    with pytest.raises(ValueError, match=r"generator must be a torch.Generator, Draws or None; got int"):
        fastadv.PGD(MODEL, 0.1, generator=3)
