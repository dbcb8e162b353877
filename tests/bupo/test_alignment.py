import numpy as np
import pytest
import torch
from bupo import alignment
from bupo.alignment import SKETCH_SIZE, Sketch, aligned, dot


def gradient(sizes, seed):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) for size in sizes]


def test_a_dot_skips_what_one_of_them_does_not_have():
    first = [torch.tensor([1.0, 2.0]), None, torch.tensor([3.0]), torch.tensor([9.0])]
    assert dot(first, [torch.tensor([4.0, 5.0]), torch.ones(2), torch.tensor([6.0])]) == 32


def test_a_sketch_of_few_numbers_is_exact():
    sizes = (7, 300, 1, 5000)
    first, second = gradient(sizes, 1), gradient(sizes, 2)
    first[1] = None
    sketch = Sketch(0)
    ends = [1, 2, 4, 2]
    a, b = sketch(first, sizes, ends), sketch(second, sizes, ends)
    for place, end in enumerate(ends):
        assert float(a[place] @ b[place]) == pytest.approx(dot(first[:end], second[:end]), rel=1e-5)


def test_a_sketch_of_many_numbers_is_unbiased_and_as_close_as_it_says():
    """Also where weights have heavy columns, as residual streams do."""
    shape = (1500, 576)
    generator = torch.Generator().manual_seed(3)
    first = torch.randn(shape, generator=generator)
    first[:, 10] *= 100
    second = first + torch.randn(shape, generator=generator) * first.std()
    size = [first.numel()]
    exact, bound = dot([first], [second]), float(first.norm() * second.norm())
    errors = []
    for seed in range(40):
        sketch = Sketch(seed)
        a, b = (sketch([it], size, [1])[0] for it in (first, second))
        errors.append((float(a @ b) - exact) / bound * SKETCH_SIZE**0.5)
    assert np.std(errors) < 2
    assert abs(np.mean(errors)) < 3 * 2 / 40**0.5


def test_a_sketch_is_linear_and_runs_over_parameters(monkeypatch):
    monkeypatch.setattr(alignment, "SKETCH_SIZE", 101)
    sketch = Sketch(5)
    sizes = (64, 90, 350)
    first, second = gradient(sizes, 1), gradient(sizes, 2)
    together = [a + b for a, b in zip(first, second, strict=True)]
    found = sketch(first, sizes, [2, 3]) + sketch(second, sizes, [2, 3])
    torch.testing.assert_close(sketch(together, sizes, [2, 3]), found, atol=1e-4, rtol=1e-4)
    # How the numbers are cut into parameters is nothing to it.
    whole = sketch([torch.cat(first)], [sum(sizes)], [1])
    torch.testing.assert_close(sketch(first, sizes, [3]), whole, atol=1e-4, rtol=1e-4)


def blocks(random, count, cosine, noise, shared, width=400):
    """Signals of length 1 with this cosine, noise of this length with cosine `shared`."""
    signal = np.zeros((2, width))
    signal[0, 0], signal[1, :2] = 1, (cosine, np.sqrt(1 - cosine**2))
    drawn = random.standard_normal((2, count, width)) * noise / np.sqrt(width)
    drawn[1] = shared * drawn[0] + np.sqrt(1 - shared**2) * drawn[1]
    size = np.exp(random.standard_normal((count, 1)) / 2)
    return [torch.from_numpy(size * (it + part)) for it, part in zip(signal, drawn, strict=True)]


def of(first, second):
    a, b = first.sum(0), second.sum(0)
    return aligned((float(a @ a), float(a @ b), float(b @ b)), first, second)


@pytest.mark.parametrize(
    ("count", "cosine", "noise", "shared"),
    [(8, 0.5, 1, 0.1), (16, 0.0, 3, 0.3), (32, 0.5, 3, 0.1), (32, -0.3, 1, 0.0)],
)
def test_intervals_cover_what_they_say(count, cosine, noise, shared):
    random = np.random.default_rng(0)
    rows = [of(*blocks(random, count, cosine, noise, shared)) for _ in range(400)]

    def coverage(name, value):
        given = [row for row in rows if not np.isnan(row[name])]
        assert len(given) > 100
        inside = [row[f"{name}_low"] <= value <= row[f"{name}_high"] for row in given]
        return np.mean(inside)

    mean = np.tanh(np.mean([np.arctanh(row["cosine"]) for row in rows]))
    ratio = np.exp(np.mean([np.log(row["norm_ratio"]) for row in rows]))
    assert 0.88 < coverage("cosine", mean) < 0.99
    assert 0.88 < coverage("norm_ratio", ratio) < 0.99
    # The cosine of batches is not that of the expected gradients; this one is.
    assert 0.86 < coverage("cosine_expected", cosine) <= 1


def test_noise_hides_an_expected_cosine():
    found = of(*blocks(np.random.default_rng(2), 12, 0.5, 300, 0.0))
    assert np.isnan([found["cosine_expected"], found["cosine_expected_low"]]).all()
    assert found["cosine_low"] < found["cosine"] < found["cosine_high"]


def test_two_blocks_have_no_interval():
    found = of(*blocks(np.random.default_rng(2), 2, 0.5, 1, 0.0))
    assert np.isfinite([found["cosine"], found["norm_ratio"]]).all()
    assert np.isnan([found["cosine_low"], found["norm_ratio_high"]]).all()


def test_one_gradient_against_itself():
    first, _ = blocks(np.random.default_rng(2), 6, 0.5, 1, 0.0)
    found = of(first, 3 * first)
    assert found["cosine"] == pytest.approx(1)
    assert found["norm_ratio"] == pytest.approx(3)
    assert found["norm_ratio_low"] == pytest.approx(3)
