from contextlib import nullcontext

import numpy as np
import pytest
import torch

import horizon.stream.batch as batch_module
from horizon.errors import BatchError
from horizon.stream.batch import IGNORED, to_micro_batches

CPU = torch.device("cpu")
VOCAB = 10
IDS = torch.tensor([[1, 2, 3], [4, 5, 6]])


def prepared(batch, **settings):
    return to_micro_batches(batch, CPU, VOCAB, **settings)


def ok(**changes):
    return {"input_ids": IDS, "labels": IDS, **changes}


def test_targets_are_the_labels_one_position_on_and_nothing_after_the_last_token():
    labels = torch.tensor([[7, IGNORED, 9], [0, 1, 2]])
    (micro,) = prepared(ok(labels=labels))
    assert torch.equal(micro.targets, torch.tensor([[IGNORED, 9, IGNORED], [1, 2, IGNORED]]))
    assert (micro.num_tokens, micro.shape) == (3, (2, 3))
    assert torch.equal(micro.batch["labels"], labels)


def test_the_model_gets_its_inputs_and_custom_losses_everything():
    mask, extra = torch.tensor([[1, 1, 0], [1, 1, 1]]), torch.zeros(7)
    (micro,) = prepared(ok(attention_mask=mask, position_ids=IDS, advantages=extra, unset=None))
    assert sorted(micro.inputs) == ["attention_mask", "input_ids", "position_ids"]
    assert sorted(micro.batch) == ["advantages", "attention_mask", "input_ids", "labels", "position_ids"]


@pytest.mark.parametrize("mask", [torch.ones(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 3).long()])
def test_a_mask_that_masks_nothing_is_dropped(mask):
    assert list(prepared(ok(attention_mask=mask))[0].inputs) == ["input_ids"]


def test_masked_tokens_may_compute_what_they_like_only_where_nobody_looks():
    """Masked tokens are documents of their own only where the loss is the built-in one and has no target at them."""
    mask = torch.tensor([[0, 1, 1], [1, 1, 1]])
    labels = torch.tensor([[IGNORED, IGNORED, 3], [4, 5, 6]])
    (unseen,) = prepared(ok(attention_mask=mask, labels=labels))
    assert unseen.documents.divisible and unseen.documents.ends.tolist() == [0, 1, 3, 6]
    (first_token_trained,) = prepared(ok(attention_mask=mask))
    (custom_loss,) = prepared(ok(attention_mask=mask, labels=labels), need_labels=False)
    assert not first_token_trained.documents.divisible and not custom_loss.documents.divisible


def test_documents_are_found_where_position_ids_restart():
    (micro,) = prepared(ok(position_ids=torch.tensor([[0, 1, 0], [0, 1, 2]])))
    assert micro.documents.packed and micro.documents.ends.tolist() == [0, 2, 3, 6]


def test_a_list_gives_one_micro_batch_each_and_one_may_be_untrained():
    untrained = ok(labels=torch.full_like(IDS, IGNORED))
    assert [m.num_tokens for m in prepared([ok(), untrained])] == [4, 0]


def test_small_integer_types_are_taken():
    (micro,) = prepared(ok(input_ids=IDS.int(), labels=IDS.short()))
    assert torch.equal(micro.inputs["input_ids"], IDS) and micro.inputs["input_ids"].dtype == torch.int64
    assert torch.equal(micro.targets[:, :-1], IDS[:, 1:])


def test_without_labels_every_token_counts():
    (micro,) = prepared({"input_ids": IDS}, need_labels=False)
    assert micro.num_tokens == 6 and bool((micro.targets == IGNORED).all())


ids = torch.tensor
WRONG = {
    "no micro-batch": ([], "the step has no micro-batch"),
    "no batch": (7, "a batch is a dict of tensors or a list of such dicts, got a int"),
    "no dict": ([ok(), IDS], "micro-batch 1 is a Tensor, expected a dict of tensors"),
    "no ids": ({"labels": IDS}, r"micro-batch 0 has no 'input_ids'; found \['labels'\]"),
    "no labels": ({"input_ids": IDS}, r"micro-batch 0 has no 'labels'; found \['input_ids'\]"),
    "labels that are None": (ok(labels=None), "micro-batch 0 has no 'labels'"),
    "a list for ids": (ok(input_ids=[[1, 2]]), "micro-batch 0: input_ids is a list, expected a tensor"),
    "an array for labels": (ok(labels=np.ones((2, 3))), "micro-batch 0: labels is a ndarray, expected a tensor"),
    "one row without its dimension": (ok(input_ids=IDS[0]), r"input_ids has shape \(3,\), expected \[rows, tokens\]"),
    "no tokens": (ok(input_ids=IDS[:, :0]), r"input_ids has shape \(2, 0\), expected \[rows, tokens\]"),
    "short labels": (ok(labels=IDS[:, 1:]), r"micro-batch 0: labels has shape \(2, 2\), input_ids \(2, 3\)"),
    "a wide mask": (ok(attention_mask=torch.ones(2, 4)), r"attention_mask has shape \(2, 4\), input_ids \(2, 3\)"),
    "positions of one row": (ok(position_ids=IDS[:1]), r"position_ids has shape \(1, 3\), input_ids \(2, 3\)"),
    "float ids": (ok(input_ids=IDS.float()), "micro-batch 0: input_ids holds torch.float32, expected integers"),
    "boolean labels": (ok(labels=IDS > 2), "micro-batch 0: labels holds torch.bool, expected integers"),
    "float positions": (ok(position_ids=IDS.half()), "position_ids holds torch.float16, expected integers"),
    "a token beyond the vocabulary": (
        [ok(), ok(input_ids=IDS + 4)],
        "micro-batch 1: input_ids holds token 10, outside the model's vocabulary of 10",
    ),
    "a negative token": (ok(input_ids=IDS - 2), "input_ids holds token -1, outside the model's vocabulary of 10"),
    "a label beyond the vocabulary": (ok(labels=IDS * 2), "labels holds token 12, outside the model"),
    "a label that is not -100": (ok(labels=IDS.where(IDS > 1, -1)), "labels holds token -1, outside"),
    "a negative position": (ok(position_ids=IDS - 2), "position_ids holds -1, outside the model's positions"),
    "nothing to train": (ok(labels=torch.full_like(IDS, IGNORED)), "no token of the batch is trained"),
    "nothing but first tokens to train": (
        ok(labels=ids([[1, IGNORED, IGNORED]] * 2)),
        "every label that has a token before it is -100",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_trained_on_is_refused_saying_why(name):
    batch, message = WRONG[name]
    with pytest.raises(BatchError, match=message) as error:
        prepared(batch)
    assert "\n" not in str(error.value)


def test_positions_stay_inside_the_models_table():
    prepared(ok(), max_positions=3)
    prepared(ok(position_ids=IDS), max_positions=7)
    with pytest.raises(BatchError, match="micro-batch 0: rows of 3 tokens, but the model has 2 positions"):
        prepared(ok(), max_positions=2)
    with pytest.raises(BatchError, match="position_ids holds 6, outside the model's positions"):
        prepared(ok(position_ids=IDS), max_positions=6)


def test_what_the_user_handed_in_is_left_as_it_was():
    batch = ok(attention_mask=torch.ones(2, 3), labels=IDS.int())
    copies = {key: value.clone() for key, value in batch.items()}
    prepared(batch)
    assert batch.keys() == copies.keys()
    assert all(torch.equal(batch[key], copies[key]) and batch[key].dtype == copies[key].dtype for key in batch)


@pytest.mark.parametrize("labels", [IDS, IDS + VOCAB], ids=["taken", "refused"])
def test_no_thread_of_torchs_is_waited_for_that_would_wait_for_a_core(labels, monkeypatch):
    seen, before, check = [], torch.get_num_threads(), batch_module._check_values

    def looking(*arguments):
        seen.append(torch.get_num_threads())
        check(*arguments)

    monkeypatch.setattr(batch_module, "_check_values", looking)
    torch.set_num_threads(3)
    try:
        with nullcontext() if labels is IDS else pytest.raises(BatchError):
            prepared(ok(labels=labels))
        assert (seen, torch.get_num_threads()) == ([1], 3)
    finally:
        torch.set_num_threads(before)
