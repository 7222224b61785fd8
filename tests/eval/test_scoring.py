"""What the engine says of tokens, choices and texts is what the model itself says."""

import json

import pytest
import torch
from torch.nn import functional as F

import horizon
from horizon import runtime
from horizon.data.tokenizer import byte_tokenizer
from horizon.errors import DataError
from horizon.eval.metrics import tally_rows, total
from horizon.eval.questions import Choice, Exact, read_questions
from horizon.eval.scoring import Sizes, answer_choices, answer_exactly, is_right, score_rows
from horizon.generation.prompts import Prompt
from tests.parity.reference import build, padded, prompted

VOCAB = 257  # of the byte tokenizer
CHOICES = (" one", "two words", "3", "drei\n")
PROMPTS = ("Say something", "x", "A much longer prompt than the others:")


@pytest.fixture(scope="module")
def model():
    return build("llama", vocab_size=VOCAB, max_position_embeddings=128, eos_token_id=None).eval()


@pytest.fixture(scope="module")
def engine(model):
    with horizon.InferenceEngine.from_pretrained(model, self_check=False, device="cpu") as found:
        yield found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("chunk_bytes", [None, 64 * 4 * 96])
def test_scores_are_those_of_the_models_logits(family, chunk_bytes, monkeypatch):
    if chunk_bytes is not None:  # 64 tokens, so that three rows of 30 are scored in two pieces
        monkeypatch.setattr(runtime, "HEAD_CHUNK_BYTES", chunk_bytes)
    source = build(family)
    batches = [padded(3, (30, 17, 5), tokens=30), prompted(4, 3)]
    with horizon.Engine.from_pretrained(source, self_check=False, device="cpu") as engine:
        scores, loss = engine.score(batches), engine.evaluate(batches)
    source.eval()
    for batch, found in zip(batches, scores, strict=True):
        inputs = {name: value for name, value in batch.items() if name != "labels"}
        with torch.no_grad():
            log_probs = source(**inputs).logits[:, :-1].log_softmax(-1)
        labels = batch["labels"][:, 1:]
        trained = labels != -100
        wanted = log_probs.gather(2, labels.clamp_min(0)[..., None])[..., 0].where(trained, 0.0)
        assert torch.equal(found.trained, F.pad(trained, (1, 0)))
        assert torch.allclose(found.log_likelihoods, F.pad(wanted, (1, 0)), atol=1e-5)
        assert torch.equal(found.correct, F.pad((log_probs.argmax(-1) == labels) & trained, (1, 0)))
    assert total(tally_rows(scores)).loss == pytest.approx(loss, abs=1e-6)


def test_rows_are_scored_alike_in_however_many_passes(engine):
    batches = [prompted(seed, 5) for seed in range(5)]
    whole = tally_rows(engine.score(batches))
    for pass_tokens in (1, 60, 1000):
        assert score_rows(engine, iter(batches), Sizes(pass_tokens=pass_tokens)) == whole


def likelihood(model, prompt, choice):
    """Of the bytes of a choice after those of its prompt: bytes are tokens here."""
    tokenizer = byte_tokenizer()
    ids = torch.tensor([tokenizer.encode(prompt + choice)])
    with torch.no_grad():
        log_probs = model(input_ids=ids).logits.log_softmax(-1)
    first = len(tokenizer.encode(prompt))
    return sum(float(log_probs[0, i - 1, ids[0, i]]) for i in range(first, ids.shape[1]))


def test_choices_have_the_likelihood_that_the_model_gives_them(engine, model):
    questions = [Choice(Prompt(prompt), CHOICES, 1) for prompt in PROMPTS]
    results = answer_choices(engine, byte_tokenizer(), questions, Sizes(micro_batch_tokens=64, pass_tokens=100))
    for question, result in zip(questions, results, strict=True):
        wanted = [likelihood(model, question.prompt.text, choice) for choice in CHOICES]
        assert result.log_likelihoods == pytest.approx(wanted, abs=1e-4)
        assert result.by_sum == wanted.index(max(wanted))
        a_byte = [value / len(choice.encode()) for value, choice in zip(wanted, CHOICES, strict=True)]
        assert result.by_byte == a_byte.index(max(a_byte))
        assert result.answer == 1
    assert any(result.by_sum != result.by_byte for result in results)


def test_texts_are_what_transformers_writes_up_to_the_stop(engine, model):
    tokenizer = byte_tokenizer()
    questions = [Exact(Prompt(prompt), ("?",)) for prompt in PROMPTS]
    free = [write(model, tokenizer, prompt) for prompt in PROMPTS]
    sizes = Sizes(prompts=2)
    found = answer_exactly(engine, tokenizer, questions, sizes, max_new_tokens=9, stop="")
    assert found == [text.strip() for text in free]
    stop = free[0][4]
    found = answer_exactly(engine, tokenizer, questions, sizes, max_new_tokens=9, stop=stop)
    assert found == [text.partition(stop)[0].strip() for text in free]
    assert is_right(Exact(Prompt("?"), ("no", f" {found[0]}\n")), found[0])
    assert not is_right(Exact(Prompt("?"), (found[0] + "x",)), found[0])


def write(model, tokenizer, prompt):
    ids = torch.tensor([tokenizer.encode(prompt)])
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    sequence = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=9, **ends)
    return tokenizer.decode(sequence[0, ids.shape[1] :], skip_special_tokens=True)


def test_a_prompt_longer_than_the_model_is_refused():
    source = build("gpt2", vocab_size=VOCAB)
    with horizon.InferenceEngine.from_pretrained(source, self_check=False, device="cpu") as engine:
        question = Choice(Prompt("x" * 60), ("short", "long" * 9), 0)
        with pytest.raises(DataError, match="has 65 tokens, but the model has 64 positions"):
            answer_choices(engine, byte_tokenizer(), [question], Sizes())


def questions_of(tmp_path, *records, tokenizer=None):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return read_questions(path, tokenizer or byte_tokenizer())


def test_questions_of_every_kind_are_read(tmp_path):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
    messages = [{"role": "user", "content": "Hi"}]
    found = questions_of(
        tmp_path,
        {"prompt": "a", "choices": ["x", "y"], "answer": "y"},
        {"prompt": "a", "choices": ["x", "x"], "answer": 1},
        "",
        {"prompt": "b", "answer": "c"},
        {"messages": messages, "answer": ["c", "d"]},
        tokenizer=tokenizer,
    )
    assert found == [
        Choice(Prompt("a"), ("x", "y"), 1),
        Choice(Prompt("a"), ("x", "x"), 1),
        Exact(Prompt("b"), ("c",)),
        Exact(Prompt("<user>Hi<assistant>", is_rendered=True), ("c", "d")),
    ]


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ("{", r"questions.jsonl:1: not JSON"),
        ("[1]", "expected an object, found a list"),
        ({"answer": "a"}, "expected either 'prompt' or 'messages'"),
        ({"prompt": "a", "messages": [], "answer": "b"}, "expected either 'prompt' or 'messages'"),
        ({"prompt": "", "answer": "b"}, "'prompt' is ''"),
        ({"messages": [{"role": "user", "content": "a"}], "answer": "b"}, "need a chat template"),
        ({"prompt": "a", "answr": "b"}, "'answr' is no field"),
        ({"prompt": "a"}, "'answer' is None"),
        ({"prompt": "a", "answer": []}, r"'answer' is \[\]"),
        ({"prompt": "a", "choices": ["b"], "answer": 0}, "'choices' is"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": "d"}, "expected one of the choices or its number, 0 to 1"),
        ({"prompt": "a", "choices": ["b", "b"], "answer": "b"}, "expected one of the choices"),
        ({"prompt": "a", "choices": ["b", "c"], "answer": True}, "'answer' is True"),
        ("", "holds no question"),
    ],
)
def test_what_is_no_question_is_refused_with_its_line(record, message, tmp_path):
    with pytest.raises(DataError, match=message):
        questions_of(tmp_path, record)
