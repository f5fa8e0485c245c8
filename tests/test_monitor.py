"""FlipMonitor and BlockFlips: rates, events, and what is written of them."""

import copy
import warnings

import pytest
import torch
import torch.distributed as dist
from tiny_models import MLP
from tiny_recipes import make, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import sparse24
from sparse24 import Recipe, ops
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.recipe.monitor import FlipMonitor, gap_quantiles, gap_sample


def feed(monitor, rates, sizes=(1000, 1000)):
    for i, rate in enumerate(rates):
        flips = torch.tensor([round(r * size) for r, size in zip(rate, sizes, strict=True)])
        monitor.push(flips, 40 * (i + 1), 40, (i + 1) / len(rates))
    monitor.rate()


@pytest.mark.fault(72)
def test_exploding_and_frozen_masks_raise_an_event_with_the_layers_names():
    """Told once each, never acted upon."""
    monitor, heard = FlipMonitor(["a", "b"], [1000, 1000]), []
    monitor.listeners.append(heard.append)
    with pytest.warns(Sparse24Warning, match="do not settle.*\\(b\\)"):
        feed(monitor, [(0.3 / (i + 1), 0.2 + 0.01 * i) for i in range(20)])
    assert [event["kind"] for event in heard] == ["explosion"] and heard[0]["layers"] == ["b"]
    monitor = FlipMonitor(["a", "b"], [1000, 1000])
    with pytest.warns(Sparse24Warning, match="hardly change.*\\(a\\)"):
        feed(monitor, [(0.0, 0.05)] * 20)


@pytest.mark.parametrize("layers, shown", [(8, "l7)"), (9, "l7 and 1 more)")])
def test_an_event_names_eight_layers_and_counts_the_others(layers, shown):
    monitor = FlipMonitor([f"l{i}" for i in range(layers)], [1000] * layers)
    with pytest.warns(Sparse24Warning, match="hardly change"):
        feed(monitor, [(0.0,) * layers] * 20, (1000,) * layers)
    (event,) = monitor.events
    assert event["message"].endswith(shown) and len(event["layers"]) == layers and event["step"] == 5 * 40


def test_before_the_first_search_all_rates_are_zero():
    monitor = FlipMonitor(["a", "b"], [1000, 500])
    assert monitor.rate() == monitor.rate_per_step() == 0
    assert monitor.layer_rates() == monitor.layer_rates(per_step=True) == {"a": 0, "b": 0}
    assert monitor.history() == []


@pytest.mark.fault(72)
def test_healthy_rates_raise_nothing():
    monitor = FlipMonitor(["a", "b"], [1000, 1000])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        feed(monitor, [(0.3 * min((i + 1) / 4, (24 - i) / 20),) * 2 for i in range(20)])
    assert not monitor.events


def test_listener_may_change_the_decay():
    """A rule of the user's own, through the event."""
    model, optimizer, recipe = make(lr=0.0, decay=1e-3, mask_interval=1, total_steps=40, dense_fraction=0)
    recipe.on_event(lambda event: setattr(recipe, "decay", recipe.decay / 2))
    with pytest.warns(Sparse24Warning, match="frozen|hardly change"):
        run(model, optimizer, 10)
    assert recipe.decay == 5e-4 and recipe.events[0]["kind"] == "frozen"


def test_history_is_written_as_csv_and_picture(tmp_path):
    monitor = FlipMonitor(["a", "b"], [1000, 500])
    feed(monitor, [(0.3, 0.2), (0.1, 0.0)], (1000, 500))
    monitor.write_csv(tmp_path / "flips.csv")
    lines = (tmp_path / "flips.csv").read_text().splitlines()
    assert (
        lines[0] == "step,interval,flip_rate,flip_rate_per_step,a,b"
        and lines[2].startswith("80,40,0.0666")
        and lines[2].endswith("0.1,0.0")
    )
    monitor.plot(tmp_path / "flips.png")
    assert (tmp_path / "flips.png").read_bytes().startswith(b"\x89PNG")


def test_rates_per_step_are_those_per_search_over_the_interval():
    monitor = FlipMonitor(["a", "b"], [1000, 500])
    feed(monitor, [(0.3, 0.2), (0.1, 0.05)], (1000, 500))
    assert monitor.layer_rates() == {"a": 0.1, "b": 0.05}
    assert monitor.layer_rates(per_step=True) == {"a": 0.1 / 40, "b": 0.05 / 40}
    assert monitor.history(per_step=True) == [(step, rate / 40) for step, rate in monitor.history()]
    assert monitor.rate_per_step() == monitor.history(per_step=True)[-1][1]


def test_metrics_rates_of_layers_and_histograms_go_to_tensorboard(tmp_path):
    tensorboard = pytest.importorskip("torch.utils.tensorboard")
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    model, optimizer, recipe = make(lr=0.2, mask_interval=2, dense_fraction=0)
    with tensorboard.SummaryWriter(tmp_path) as writer:
        recipe.write_tensorboard(writer)  # nothing is known of flips yet
        for step in (1, 2):
            run(model, optimizer, 2, step)
            recipe.write_tensorboard(writer)
    events = accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    tags = events.Tags()
    assert {"sparse24/flip_rate", "sparse24/gap_q50", "sparse24/flip_rate/fc1", "sparse24/flip_rate/fc2"} <= {
        *tags["scalars"]
    }
    assert {*tags["histograms"]} == {"sparse24/gap", "sparse24/flip_rate_of_layers"}
    points = events.Scalars("sparse24/flip_rate/fc1")
    assert [point.step for point in points] == [2, 4]
    assert points[-1].value == pytest.approx(recipe.monitor.layer_rates()["fc1"])
    blocks = sum(layer.weight.numel() // 16 for layer in recipe.layers.values())
    assert events.Histograms("sparse24/gap")[-1].histogram_value.num == blocks


def test_gap_quantiles_are_those_of_all_blocks_or_of_a_fair_sample():
    weights = [torch.randn(1200, 160), 2 * torch.randn(80, 640).t()]  # one of each layout
    gaps = torch.cat([ops.mask_gap(w).flatten() for w in weights])
    exact = torch.quantile(gaps, torch.tensor([0.1, 0.5, 0.9]))
    found = gap_quantiles(weights)
    assert found == dict(zip(("gap_q10", "gap_q50", "gap_q90"), exact.tolist(), strict=True))
    assert gap_sample([torch.randn(2048, 1024)]).numel() == 1 << 15, "one row of blocks in four"
    sample = gap_sample(weights, most=gaps.numel() // 8)
    assert gaps.numel() / 8.5 < sample.numel() < gaps.numel() / 7.5
    places = [(gaps <= value).float().mean().item() for value in gap_quantiles(weights, gaps.numel() // 8).values()]
    # a share of 1,900 blocks is known to 0.0115: three and a half standard errors
    assert places == pytest.approx([0.1, 0.5, 0.9], abs=0.04)


def test_gap_quantiles_are_read_once_a_search():
    """Metrics between two searches tell the same gaps; a search, or a state, brings those of its weights."""
    model, optimizer, recipe = make(lr=0.5, mask_interval=2, dense_fraction=0)
    told = []
    for step in range(4):
        told.append({key: value for key, value in recipe.metrics().items() if key.startswith("gap_")})
        run(model, optimizer, 1, step)
    assert told[0] == told[1] != told[2] == told[3]
    state = recipe.state_dict()
    recipe.metrics()
    with torch.no_grad():
        model.fc1.weight.mul_(2)
        model.fc2.weight.mul_(2)
    recipe.load_state_dict(state)
    assert recipe.metrics()["gap_q50"] == gap_quantiles([layer.weight for layer in recipe.layers.values()])["gap_q50"]


def test_gaps_are_of_the_shards_where_a_forward_pass_has_left_gathered_weights():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = MLP()
        sparse24.sparsify(model)
        fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
        recipe = Recipe(model, torch.optim.SGD(model.parameters(), lr=0.1), total_steps=4)
        shards = [layer.weight.detach().to_local() for layer in (model.fc1, model.fc2)]
        with torch.no_grad():
            model(torch.randn(4, 16))
            for shard in shards:
                shard.copy_(torch.randn_like(shard))
        told = recipe.metrics()
        assert {key: told[key] for key in told if key.startswith("gap_")} == gap_quantiles(shards)
    finally:
        dist.destroy_process_group()


def test_flips_of_blocks_add_up_and_can_be_drawn_against_their_gaps(tmp_path):
    model, optimizer, recipe = make(lr=0.2, mask_interval=2, dense_fraction=0, track_blocks=True)
    with pytest.raises(Sparse24Error, match="no search has been counted"):
        recipe.plot_flips_against_gap(tmp_path / "gap.png")
    run(model, optimizer, 8)
    recipe.metrics()
    total = sum(sum(flips) for flips in recipe.monitor.flips)
    assert total > 0 and int(recipe.block_flips.counts.sum()) == total
    recipe.plot_flips_against_gap(tmp_path / "gap.png")
    assert (tmp_path / "gap.png").stat().st_size > 1000
    settings = dict(mask_interval=2, dense_fraction=0, track_blocks=True)
    *_, again = make(model=copy.deepcopy(model), **settings)
    again.load_state_dict(recipe.state_dict())
    assert again.block_flips.searches == 4
    assert torch.equal(again.block_flips.counts, recipe.block_flips.counts)
    *_, uncounted = make(model=copy.deepcopy(model), mask_interval=2, dense_fraction=0)
    uncounted.load_state_dict(recipe.state_dict())
    again.load_state_dict(uncounted.state_dict())
    assert uncounted.block_flips is None and again.block_flips.searches == 4
    *_, wider = make(model=MLP(32, 64), **settings)
    with pytest.raises(Sparse24Error, match="of other layers"):
        wider.block_flips.load_state_dict(
            recipe.block_flips.state_dict(), [layer.mask for layer in wider.layers.values()]
        )


def test_a_state_with_flips_of_other_blocks_is_refused_and_changes_nothing():
    model, optimizer, recipe = make(lr=0.5, mask_interval=1, dense_fraction=0, track_blocks=True)
    run(model, optimizer, 2)
    state = recipe.state_dict()
    state["blocks"]["counts"] = [torch.zeros(3, dtype=torch.int32)]
    run(model, optimizer, 2, 2)
    mask, counts = model.fc1.mask.clone(), recipe.block_flips.counts.clone()
    assert not torch.equal(mask, state["masks"]["fc1"])
    with pytest.raises(Sparse24Error, match="flips per block in the state are of other layers"):
        recipe.load_state_dict(state)
    assert recipe.step == 4 and torch.equal(model.fc1.mask, mask) and torch.equal(recipe.block_flips.counts, counts)


# -- thresholds, just below and just above ----------------------------------------------------------------------------


def events_of(rates, progress, size=1_000_000):
    """Kinds of events of one layer whose flip rates are `rates`, each at the `progress` beside it."""
    monitor = FlipMonitor(["a"], [size])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, (rate, done) in enumerate(zip(rates, progress, strict=True)):
            monitor.push(torch.tensor([round(rate * size)]), i + 1, 1, done)
        monitor.rate()
    return [event["kind"] for event in monitor.events]


@pytest.mark.parametrize(
    "rate, progress, events",
    [
        (0.101, 0.51, ["explosion"]),
        (0.1, 0.5, ["explosion"]),
        (0.099, 0.51, []),  # not high
        (0.101, 0.49, []),  # early
    ],
)
def test_explosion_begins_at_its_rate_and_its_part_of_the_run(rate, progress, events):
    assert events_of([rate] * 5, [0.0] * 4 + [progress]) == events
    assert events_of([rate] * 4, [progress] * 4) == []  # too few to tell


def test_a_rate_that_has_fallen_from_its_peak_is_no_explosion():
    peak = 0.4
    assert events_of([peak] + [0.89 * peak] * 5, [0.0] * 5 + [0.9]) == []
    assert events_of([peak] + [0.91 * peak] * 5, [0.0] * 5 + [0.9]) == ["explosion"]


@pytest.mark.parametrize(
    "rate, progress, events",
    [
        (0.24e-4, 0.39, ["frozen"]),
        (0.24e-4, 0.4, ["frozen"]),
        (0.25e-4, 0.39, []),  # a block in 10,000
        (0.26e-4, 0.39, []),  # moves
        (0.24e-4, 0.41, []),  # late: masks may settle
    ],
)
def test_frozen_is_below_its_rate_in_the_first_part_of_the_run(rate, progress, events):
    assert events_of([rate] * 5, [0.5] * 4 + [progress]) == events


def test_peaks_and_reports_come_back_with_the_state():
    """A peak of before still counts after loading, and what was told is not told again."""
    first = FlipMonitor(["a"], [1000])
    first.push(torch.tensor([400]), 1, 1, 0.1)
    again = FlipMonitor(["a"], [1000])
    again.load_state_dict(first.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for step in range(2, 8):
            again.push(torch.tensor([300]), step, 1, 0.9)
        assert again.rate() == 0.3 and not again.events
    told = FlipMonitor(["a"], [1000])
    with pytest.warns(Sparse24Warning, match="do not settle"):
        for step in range(1, 7):
            told.push(torch.tensor([300]), step, 1, 0.9)
        told.rate()
    again = FlipMonitor(["a"], [1000])
    again.load_state_dict(told.state_dict())
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again.push(torch.tensor([300]), 7, 1, 0.9)
        assert again.rate() == 0.3 and not again.events
