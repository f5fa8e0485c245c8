"""The Hugging Face Trainer starts again, goes on longer, and evaluates what was saved: masks and phase come along."""

import copy
import json
import shutil
import warnings

import pytest
import torch
from tiny_models import gpt2, llama, tokens

import sparse24
from sparse24.errors import Sparse24Error, Sparse24Warning

pytest.importorskip("transformers")
pytest.importorskip("accelerate")
from tiny_trainers import Texts, eval_loss, hf_trainer, sparse_layers_of  # noqa: E402
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from sparse24.integrations.transformers import Sparse24Callback

SPARSE_TO_THE_END = dict(dense_fraction=0, mask_interval=7, decay=1e-3)


def state_file(folder, step=10):
    return folder / f"checkpoint-{step}" / "sparse24.pt"


# -- evaluation of what was saved -------------------------------------------------------------------------------------


@pytest.mark.fault(81)
@pytest.mark.parametrize("dense_fraction, phase", [(0, "sparse"), (0.25, "dense")])
@pytest.mark.parametrize("whole", [True, False], ids=["checkpoint", "save_model"])
def test_a_saved_model_evaluated_in_a_new_trainer_has_the_runs_own_loss(tmp_path, dense_fraction, phase, whole):
    """Between two mask searches, so that searching again would find other masks."""
    settings = SPARSE_TO_THE_END | dict(dense_fraction=dense_fraction)
    trainer, callback = hf_trainer(tmp_path, steps=12, arguments=dict(save_steps=12), **settings)
    trainer.train()
    expected = eval_loss(trainer)
    folder = tmp_path / "checkpoint-12"
    if not whole:
        folder = tmp_path / "final"
        trainer.save_model(str(folder))
        if phase == "sparse":
            shutil.copy(state_file(tmp_path, 12), folder)
    again, _ = hf_trainer(tmp_path / "elsewhere", GPT2LMHeadModel.from_pretrained(folder), **settings)
    assert {layer.phase for layer in sparse_layers_of(again.model)} == {phase}
    assert eval_loss(again) == expected
    predicted = again.predict(Texts()).metrics["test_loss"]
    assert predicted == expected


@pytest.mark.fault(81, 88)
def test_weights_without_their_masks_are_told_of_and_load_masks_mends_it(tmp_path):
    trainer, _ = hf_trainer(tmp_path, steps=10, **SPARSE_TO_THE_END)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    model = GPT2LMHeadModel.from_pretrained(tmp_path / "final")
    with pytest.warns(Sparse24Warning, match="saved under other masks.*sparse24.load_masks"):
        again, _ = hf_trainer(tmp_path / "elsewhere", model, **SPARSE_TO_THE_END)
    assert eval_loss(again) != eval_loss(trainer)
    sparse24.load_masks(again.model, torch.load(state_file(tmp_path), weights_only=True))
    assert eval_loss(again) == eval_loss(trainer)


def test_config_says_which_function_the_weights_belong_to(tmp_path):
    trainer, callback = hf_trainer(tmp_path, steps=5)
    trainer.train()
    saved = json.loads((tmp_path / "checkpoint-5" / "config.json").read_text())
    state = torch.load(state_file(tmp_path, 5), weights_only=True)
    assert saved["sparse24"]["function"].startswith("dense-") and state["phase"] == "dense"


@pytest.mark.fault(81)
@pytest.mark.parametrize("dense_fraction", [0, 0.25])
def test_a_new_model_under_the_config_of_a_trained_one_is_a_model_of_its_own(tmp_path, dense_fraction):
    settings = SPARSE_TO_THE_END | dict(dense_fraction=dense_fraction)
    trainer, _ = hf_trainer(tmp_path, **settings)
    trainer.train()
    with warnings.catch_warnings():
        warnings.simplefilter("error", Sparse24Warning)
        again, _ = hf_trainer(tmp_path / "again", GPT2LMHeadModel(trainer.model.config), **settings)
    assert {layer.phase for layer in sparse_layers_of(again.model)} == {"sparse"}


@pytest.mark.fault(81)
def test_masks_of_a_model_from_the_current_folder_are_taken(tmp_path, monkeypatch):
    trainer, _ = hf_trainer(tmp_path, steps=12, arguments=dict(save_steps=12), **SPARSE_TO_THE_END)
    trainer.train()
    monkeypatch.chdir(tmp_path / "checkpoint-12")
    again, _ = hf_trainer(tmp_path / "elsewhere", GPT2LMHeadModel.from_pretrained("."), **SPARSE_TO_THE_END)
    assert eval_loss(again) == eval_loss(trainer)


@pytest.mark.fault(81)
@pytest.mark.parametrize("dense_fraction", [0, 0.25])
def test_the_best_model_comes_back_with_its_own_masks_and_phase(tmp_path, dense_fraction):
    class Spoil(TrainerCallback):
        """The run gets worse after the fourth step, so that an earlier checkpoint is the best."""

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step >= 4:
                with torch.no_grad():
                    for p in model.parameters():
                        p.add_(torch.randn_like(p), alpha=0.05)
                sparse24.refresh(model)

    arguments = dict(eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, logging_steps=50)
    trainer, _ = hf_trainer(tmp_path, steps=12, arguments=arguments, dense_fraction=dense_fraction, mask_interval=3)
    trainer.add_callback(Spoil())
    trainer.train()
    assert int(trainer.state.best_model_checkpoint.rpartition("-")[2]) <= 6
    assert eval_loss(trainer) == trainer.state.best_metric
    assert {layer.phase for layer in sparse_layers_of(trainer.model)} == {"sparse"}


@pytest.mark.fault(81, 88)
def test_a_best_model_without_its_masks_is_told_of(tmp_path):
    class Lose(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 4:
                state_file(tmp_path, 2).unlink()

    arguments = dict(
        eval_strategy="steps", eval_steps=2, save_steps=2, load_best_model_at_end=True, metric_for_best_model="step",
        greater_is_better=False,
    )  # fmt: skip
    trainer, _ = hf_trainer(tmp_path, steps=4, arguments=arguments)
    trainer.compute_metrics = lambda prediction: {"step": trainer.state.global_step}
    trainer.add_callback(Lose())
    with pytest.warns(Sparse24Warning, match="no sparse24.pt beside them.*sparse24.refresh"):
        trainer.train()


# -- starting again ---------------------------------------------------------------------------------------------------


@pytest.mark.fault(87)
def test_auto_find_batch_size_starts_the_recipe_again(tmp_path):
    trainer, callback = hf_trainer(tmp_path, steps=6, arguments=dict(auto_find_batch_size=True, save_strategy="no"))
    compute = trainer.compute_loss

    def out_of_memory_once(model, inputs, *args, **kwargs):
        if model.training and inputs["input_ids"].shape[0] > 1 and trainer.state.global_step >= 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. made up")
        return compute(model, inputs, *args, **kwargs)

    trainer.compute_loss = out_of_memory_once
    trainer.train()
    assert trainer.state.global_step == callback.recipe.step == 6 and sparse24.verify(trainer.model)


@pytest.mark.fault(87)
def test_a_second_train_begins_anew_like_the_trainer(tmp_path):
    trainer, callback = hf_trainer(tmp_path, steps=8)
    trainer.train()
    first = callback.recipe
    assert first.phase == "dense"
    trainer.train()
    assert callback.recipe is not first and callback.recipe.step == trainer.state.global_step == 8
    assert [entry["sparse24/phase"] for entry in trainer.state.log_history if "loss" in entry] == [0, 0, 1, 1]


@pytest.mark.fault(87, 88)
def test_resuming_with_more_steps_wants_override_and_then_follows_the_new_plan(tmp_path):
    hf_trainer(tmp_path, steps=10, mvue=False)[0].train()
    checkpoint = str(tmp_path / "checkpoint-5")
    longer, _ = hf_trainer(tmp_path, steps=20, mvue=False)
    with pytest.raises(Sparse24Error, match="total_steps was 10, is 20.*pass override=True"):
        longer.train(resume_from_checkpoint=checkpoint)
    longer, callback = hf_trainer(tmp_path, steps=20, mvue=False, override=True)
    longer.train(resume_from_checkpoint=checkpoint)
    assert callback.recipe.step == 20 and callback.recipe.phases.sparse_until == 15
    phases = {e["sparse24/step"]: e["sparse24/phase"] for e in longer.state.log_history if "loss" in e}
    assert phases[14] == 0 and phases[16] == 1


@pytest.mark.fault(87, 88)
def test_a_dense_runs_checkpoint_is_gone_on_with_by_searching_masks(tmp_path):
    arguments = TrainingArguments(
        output_dir=str(tmp_path), max_steps=5, save_steps=5, logging_steps=2, report_to=[], use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    Trainer(model=gpt2(), args=arguments, train_dataset=Texts()).train()
    checkpoint = str(tmp_path / "checkpoint-5")
    sparse, _ = hf_trainer(tmp_path, steps=12)
    with pytest.raises(Sparse24Error, match=r'no sparse24.pt in .*Sparse24Callback\(masks="search"\)'):
        sparse.train(resume_from_checkpoint=checkpoint)
    sparse, callback = hf_trainer(tmp_path, steps=12, masks="search")
    sparse.train(resume_from_checkpoint=checkpoint)
    assert callback.recipe.step == sparse.state.global_step == 12 and callback.recipe.phase == "dense"
    phases = [entry["sparse24/phase"] for entry in sparse.state.log_history if "sparse24/phase" in entry]
    assert phases[0] == 0 and phases[-1] == 1


@pytest.mark.fault(87)
@pytest.mark.parametrize(
    "arguments", [dict(gradient_accumulation_steps=1), dict(save_only_model=True)], ids=["accumulation", "only_model"]
)
def test_resuming_with_another_accumulation_or_without_an_optimizer(tmp_path, arguments):
    hf_trainer(tmp_path, steps=10, arguments={k: v for k, v in arguments.items() if k == "save_only_model"})[0].train()
    again, callback = hf_trainer(tmp_path, steps=10, arguments=arguments)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback.recipe.step == 10 and sparse24.verify(again.model)


@pytest.mark.fault(87, 88)
def test_a_moved_checkpoint_is_named_in_the_arguments(tmp_path):
    hf_trainer(tmp_path / "before", steps=10)[0].train()
    (tmp_path / "before").rename(tmp_path / "after")
    checkpoint = str(tmp_path / "after" / "checkpoint-5")
    again, _ = hf_trainer(tmp_path / "new", steps=10)
    with pytest.raises(Sparse24Error, match="Set args.resume_from_checkpoint"):
        again.train(resume_from_checkpoint=checkpoint)
    again, callback = hf_trainer(tmp_path / "new", steps=10, arguments=dict(resume_from_checkpoint=checkpoint))
    again.train(resume_from_checkpoint=checkpoint)
    assert callback.recipe.step == 10


@pytest.mark.fault(47, 88)
@pytest.mark.parametrize("damage", ["truncated", "empty", "garbage", "no masks", "a list", "a flipped byte"])
def test_a_damaged_state_is_refused_by_name(tmp_path, damage):
    hf_trainer(tmp_path, steps=5)[0].train()
    file = state_file(tmp_path, 5)
    data = file.read_bytes()
    if damage in ("no masks", "a list"):
        state = torch.load(file, weights_only=True)
        torch.save([1] if damage == "a list" else {k: v for k, v in state.items() if k != "masks"}, file)
    else:
        at = data.index(b"sparse_from") - 3
        flipped = data[:at] + bytes([data[at] ^ 0xFF]) + data[at + 1 :]
        file.write_bytes(
            {"truncated": data[:100], "empty": b"", "garbage": b"x" * 300, "a flipped byte": flipped}[damage]
        )
    again, _ = hf_trainer(tmp_path, steps=8)
    with pytest.raises(Sparse24Error, match=r"sparse24\.pt.*masks=\"search\""):
        again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    again, callback = hf_trainer(tmp_path, steps=8, masks="search")
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert callback.recipe.step == 8


# -- models that are sparse already -----------------------------------------------------------------------------------


@pytest.mark.fault(77)
def test_a_model_that_is_sparse_already_is_left_as_it_is(tmp_path):
    model = llama()
    sparse24.sparsify(model, exclude=("*down_proj",))
    trainer, callback = hf_trainer(tmp_path, model, steps=3)
    trainer.train()
    assert not callback.report.converted and len(sparse_layers_of(model)) == 4 and callback.recipe.step == 3


def test_masks_must_be_a_known_word():
    with pytest.raises(Sparse24Error, match="masks must be one of load, search, got 'find'"):
        Sparse24Callback(masks="find")


def trained_with_references(trainer) -> list[str]:
    """What sparse24 warns of in a run of `trainer`."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", Sparse24Warning)
        trainer.train()
    return [str(w.message) for w in caught if issubclass(w.category, Sparse24Warning)]


@pytest.mark.fault(79)
@pytest.mark.parametrize("references", ["follow", "keep"])
def test_a_dense_reference_begins_as_the_model_does_unless_it_is_to_be_kept(tmp_path, references):
    """As TRL's DPOTrainer has one, made before the callback converts the policy."""
    trainer, _ = hf_trainer(tmp_path, steps=4, references=references)
    policy = trainer.model
    trainer.ref_model, start = gpt2(), copy.deepcopy(policy.state_dict())
    trainer.ref_model.load_state_dict(start)
    trainer.other_model = gpt2(width=64)  # of another shape: not compared
    assert not any("_model" in told for told in trained_with_references(trainer))
    if references == "keep":
        assert not sparse_layers_of(trainer.ref_model)
        return
    begun = gpt2()
    sparse24.sparsify(begun)
    begun.load_state_dict(start)
    x = tokens(2, 16)[0][None]
    with torch.no_grad():
        torch.testing.assert_close(trainer.ref_model(x).logits, begun(x).logits)


@pytest.mark.fault(79)
def test_a_resumed_run_has_the_reference_that_it_began_with(tmp_path):
    trainer, _ = hf_trainer(tmp_path, steps=8)
    start = copy.deepcopy(trainer.model.state_dict())

    def with_reference(trainer):
        trainer.ref_model = gpt2()
        trainer.ref_model.load_state_dict(start)
        return trainer

    trained_with_references(with_reference(trainer))
    resumed, _ = hf_trainer(tmp_path, steps=8)
    with_reference(resumed).train(resume_from_checkpoint=f"{tmp_path}/checkpoint-5")
    x = tokens(2, 16)[0][None]
    with torch.no_grad():
        torch.testing.assert_close(resumed.ref_model(x).logits, trainer.ref_model(x).logits)


@pytest.mark.fault(79)
def test_another_dense_model_with_the_same_weights_is_told_of(tmp_path):
    trainer, _ = hf_trainer(tmp_path, steps=1)
    trainer.teacher = gpt2()
    trainer.teacher.load_state_dict(trainer.model.state_dict())
    told = trained_with_references(trainer)
    assert any("trainer.teacher" in text for text in told) and not sparse_layers_of(trainer.teacher)


def test_references_must_be_a_known_word():
    with pytest.raises(Sparse24Error, match="references must be one of follow, keep, got 'dense'"):
        Sparse24Callback(references="dense")
