"""What the callbacks of both trainers, Hugging Face's and Lightning's, do alike."""

import pytest

import sparse24
from sparse24.errors import Sparse24Error

pytest.importorskip("accelerate")  # the Hugging Face Trainer wants it
HFCallback = pytest.importorskip("sparse24.integrations.transformers").Sparse24Callback
LightningCallback = pytest.importorskip("sparse24.integrations.lightning").Sparse24Callback
from tiny_layers import sparse_names  # noqa: E402
from tiny_lightning import fit  # noqa: E402
from tiny_trainers import hf_trainer  # noqa: E402


@pytest.mark.parametrize("kind", ["hf", "lightning"])
def test_unknown_settings_are_refused_at_once(kind):
    callback = HFCallback if kind == "hf" else LightningCallback
    with pytest.raises(Sparse24Error, match="takes no setting 'mask_intervall'; did you mean mask_interval?"):
        callback(mask_intervall=20)


@pytest.mark.fault(36)
def test_trainers_train_dense_where_auto_leaves_the_model_dense(tmp_path, monkeypatch):
    """A GPU without our kernels: sparsify warns, and training goes on."""
    why = "no 2:4 products on cuda:0: too old"
    monkeypatch.setattr(sparse24.convert.choice, "why_unavailable", lambda *asked: why)
    with pytest.warns(sparse24.Sparse24Warning, match="left the model dense: no 2:4 products"):
        trainer, callback = hf_trainer(tmp_path, steps=2)
    trainer.train()
    assert callback.recipe is None and trainer.state.global_step == 2
    with pytest.warns(sparse24.Sparse24Warning, match="left the model dense: no 2:4 products"):
        module, callback, trainer = fit(tmp_path, 2)
    assert callback.recipe is None and trainer.global_step == 2 and not sparse_names(module)
