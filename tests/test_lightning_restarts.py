"""Lightning validates, tests, predicts, fits twice and goes on: masks and phase are those of the weights."""

import pytest
import torch
from rounding import ORDER

import sparse24
from sparse24.errors import Sparse24Error, Sparse24Warning
from sparse24.layers.modules import SparseLayer

lightning = pytest.importorskip("lightning")
from tiny_lightning import MadeLate, Regression, callback_of, loader, saving, trainer_of  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:lightning")


def fitted(folder, steps=10, make=Regression, ckpt=None, weights_only=False, **settings):
    """A module that has been fitted, its callback, and the checkpoint of step 10."""
    callback = callback_of(**settings)
    save = saving(folder, save_weights_only=weights_only)
    trainer = trainer_of(folder, callback, save, max_steps=steps, enable_checkpointing=True)
    module = make()
    trainer.fit(module, loader(), ckpt_path=ckpt)
    return module, callback, folder / f"step={10 if steps >= 10 else 5}.ckpt"


def loss_of(module):
    with torch.no_grad():
        return sum(module.loss(batch).item() for batch in loader(1)) / len(loader(1))


def phases_of(module):
    return {m.phase for m in module.modules() if isinstance(m, SparseLayer)}


# -- evaluation in a new program --------------------------------------------------------------------------------------


@pytest.mark.fault(81)
@pytest.mark.parametrize("make", [Regression, MadeLate])
@pytest.mark.parametrize("dense_fraction, phase", [(0, "sparse"), (0.25, "dense")])
def test_a_checkpoint_evaluated_in_a_new_trainer_has_the_runs_own_loss(tmp_path, make, dense_fraction, phase):
    """Saved between two mask searches, in the sparse phase and in the dense one."""
    module, _, path = fitted(tmp_path, make=make, dense_fraction=dense_fraction)
    expected, predicted = loss_of(module), module.net(torch.ones(1, 16))
    for stage in ("validate", "test", "predict"):
        fresh = make()
        trainer = trainer_of(tmp_path, callback_of(dense_fraction=dense_fraction))
        settings = {} if stage == "predict" else dict(verbose=False)
        result = getattr(trainer, stage)(fresh, loader(1), ckpt_path=path, **settings)
        if stage != "predict":
            assert result[0]["loss"] == pytest.approx(expected, rel=ORDER)
        assert phases_of(fresh) == {phase} and torch.equal(fresh.net(torch.ones(1, 16)), predicted)


@pytest.mark.fault(81)
def test_testing_the_best_checkpoint_after_fitting_takes_its_masks_and_phase(tmp_path):
    callback, save = callback_of(dense_fraction=0.25), saving(tmp_path)
    trainer = trainer_of(tmp_path, callback, save, max_steps=12, enable_checkpointing=True)
    module = Regression()
    losses = {}

    class Look(lightning.Callback):
        def on_train_batch_end(self, trainer, pl_module, *args):
            losses[trainer.global_step] = loss_of(pl_module)

    trainer.callbacks.insert(1, Look())
    trainer.fit(module, loader())
    assert phases_of(module) == {"dense"}
    result = trainer.test(module, loader(1), ckpt_path=tmp_path / "step=5.ckpt", verbose=False)
    assert result[0]["loss"] == pytest.approx(losses[5], rel=ORDER) and phases_of(module) == {"sparse"}


@pytest.mark.fault(80)
def test_weights_saved_alone_are_told_of(tmp_path):
    """save_weights_only leaves the callbacks' states out; the fingerprint in the weights' metadata is still there."""
    _, _, path = fitted(tmp_path, weights_only=True)
    with pytest.warns(Sparse24Warning, match="load_masks"):
        trainer_of(tmp_path, callback_of()).test(Regression(), loader(1), ckpt_path=path, verbose=False)


@pytest.mark.fault(81, 88)
def test_a_dense_module_evaluated_without_a_checkpoint_is_told_of(tmp_path):
    module, callback, path = fitted(tmp_path)
    loaded = Regression.load_from_checkpoint(path)
    with pytest.warns(Sparse24Warning, match="Name its checkpoint in ckpt_path=, or call sparse24.load_masks"):
        trainer_of(tmp_path, callback_of()).test(loaded, loader(1), verbose=False)
    loaded = Regression.load_from_checkpoint(path)
    state = torch.load(path, weights_only=True)["callbacks"]["Sparse24Callback"]
    sparse24.load_masks(loaded, state)
    result = trainer_of(tmp_path, callback_of()).test(loaded, loader(1), verbose=False)
    assert result[0]["loss"] == pytest.approx(loss_of(module), rel=ORDER)


# -- fitting again ----------------------------------------------------------------------------------------------------


@pytest.mark.fault(87)
def test_a_second_fit_of_the_same_trainer_goes_on(tmp_path):
    """Lightning counts on; so does the recipe, and the two halves are the whole run."""
    whole, _, _ = fitted(tmp_path / "whole", steps=10, mvue=False, dense_fraction=0.25)
    callback = callback_of(mvue=False, dense_fraction=0.25)
    module, trainer = Regression(), trainer_of(tmp_path, callback, max_steps=5)
    trainer.fit(module, loader())
    first, optimizer = callback.recipe, trainer.optimizers[0].state_dict()
    module.configure_optimizers = lambda: _loaded(torch.optim.AdamW(module.parameters(), lr=1e-2), optimizer)
    trainer.fit_loop.epoch_loop.max_steps = 10
    trainer.fit_loop.max_epochs = 2
    trainer.fit(module, loader())
    assert callback.recipe is not first and callback.recipe.step == trainer.global_step == 10
    assert phases_of(module) == {"dense"}
    for ours, theirs in zip(module.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs)


def _loaded(optimizer, state):
    optimizer.load_state_dict(state)
    return optimizer


@pytest.mark.fault(87)
def test_another_trainer_with_the_same_callback_begins_anew(tmp_path):
    callback = callback_of(dense_fraction=0.25)
    module = Regression()
    for _ in range(2):
        trainer_of(tmp_path, callback, max_steps=10).fit(module, loader())
        assert callback.recipe.step == 10 and phases_of(module) == {"dense"}
    assert [step for step, _ in callback.recipe.monitor.history()] == [7]


@pytest.mark.fault(87, 88)
def test_resuming_with_more_steps_wants_override(tmp_path):
    _, _, path = fitted(tmp_path, dense_fraction=0.25)
    with pytest.raises(Sparse24Error, match="total_steps was 12, is 20.*pass override=True"):
        fitted(tmp_path, steps=20, ckpt=path, total_steps=20, dense_fraction=0.25)
    _, callback, _ = fitted(tmp_path, steps=20, ckpt=path, total_steps=20, dense_fraction=0.25, override=True)
    assert callback.recipe.step == 20 and callback.recipe.phases.sparse_until == 15


@pytest.mark.fault(87, 88)
def test_a_dense_runs_checkpoint_is_gone_on_with_by_searching_masks(tmp_path):
    dense = trainer_of(tmp_path, saving(tmp_path), max_steps=5, enable_checkpointing=True)
    dense.fit(Regression(), loader())
    path = tmp_path / "step=5.ckpt"
    with pytest.raises(Sparse24Error, match=r'checkpoint has no masks.*Sparse24Callback\(masks="search"\)'):
        fitted(tmp_path, ckpt=path)
    _, callback, _ = fitted(tmp_path, ckpt=path, masks="search", dense_fraction=0.25)
    assert callback.recipe.step == 10 and callback.recipe.phase == "dense"


@pytest.mark.fault(61)
def test_resuming_between_two_searches_equals_the_uninterrupted_run(tmp_path):
    whole, _, _ = fitted(tmp_path, steps=10, mvue=False)
    resumed, _, _ = fitted(tmp_path, steps=10, ckpt=tmp_path / "step=5.ckpt", mvue=False)
    for ours, theirs in zip(resumed.parameters(), whole.parameters(), strict=True):
        assert torch.equal(ours, theirs)


class AtTheSecondEpoch(lightning.pytorch.callbacks.LearningRateFinder):
    """Searches for a learning rate in mid-training, as Lightning's documentation has it, and puts everything back."""

    def on_fit_start(self, *_):
        """Not yet."""

    def on_train_epoch_start(self, trainer, module):
        if trainer.current_epoch == 1:
            self.lr_find(trainer, module)


@pytest.mark.fault(108)
def test_a_search_for_a_learning_rate_in_mid_training_leaves_no_trace(tmp_path):
    """The recipe goes back to the checkpoint that Lightning restores: weights are those of a run without it,
    but for noise, since Lightning sets its data up anew and draws for that.
    """

    def trained(*others):
        module, callback = Regression(), callback_of(dense_fraction=0.25, mask_interval=3, mvue=False)
        module.lr = 1e-2
        torch.manual_seed(7)
        trainer = trainer_of(tmp_path, callback, *others, max_steps=12)
        trainer.fit(module, loader())
        assert callback.recipe.step == trainer.global_step == 12
        return module

    plain, searched = trained(), trained(AtTheSecondEpoch(num_training_steps=6, update_attr=False))
    assert sparse24.verify(searched) and all(map(torch.equal, plain.parameters(), searched.parameters()))
