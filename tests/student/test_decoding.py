"Decoded side by side or alone, the answer is the same; slots are refilled; adapters do not leak"

import threading
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from cot_distill.core.errors import InputError
from cot_distill.core.problems import load_problems
from cot_distill.core.settings import StudentConfig
from cot_distill.student import slots
from cot_distill.student.engines import Completion, bytes_a_slot, decode, lay_out, slots_that_fit
from cot_distill.student.lora import use_adapter
from cot_distill.student.model import load_student, prompt_ids, stop_ids
from cot_distill.student.slots import DecodeTally, SlotModel, pick_tokens

VOCABULARY = 211
SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
}


class Numbers:
    "A tokenizer whose text is the token ids"

    def decode(self, ids: list[int], **_: Any) -> str:
        return " ".join(map(str, ids))


@pytest.fixture(scope="module", params=["qwen2", "llama"])
def model(request: pytest.FixtureRequest) -> Any:
    torch.manual_seed(7)
    if request.param == "qwen2":
        made = Qwen2ForCausalLM(Qwen2Config(**SHAPE, tie_word_embeddings=True))
    else:
        made = LlamaForCausalLM(LlamaConfig(**SHAPE))
    for parameter in made.parameters():
        parameter.data.mul_(3)  # sharper than at birth, so that texts differ
    return made.eval()


def random_prompts(n: int, seed: int = 0, shared: int = 0) -> list[list[int]]:
    rng = torch.Generator().manual_seed(seed)
    beginning = torch.randint(0, VOCABULARY, (shared,), generator=rng).tolist()
    lengths = torch.randint(1, 40, (n,), generator=rng).tolist()
    return [beginning + torch.randint(0, VOCABULARY, (k,), generator=rng).tolist() for k in lengths]


def generate_alone(model: Any, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
    "What `transformers` itself writes for one prompt, without the stop token"
    ids, n_threads = torch.tensor([prompt]), torch.get_num_threads()
    torch.set_num_threads(1)  # a tiny product gains nothing from two
    with torch.inference_mode():
        out = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=sorted(stop) or None,
            pad_token_id=0,
        )
    torch.set_num_threads(n_threads)
    written = out[0, len(prompt) :].tolist()
    return written[:-1] if written[-1] in stop else written


STOP = set(range(0, VOCABULARY, 17))


@pytest.mark.parametrize(("slots", "shared"), [(1, 0), (3, 0), (8, 24), (64, 24)])
def test_side_by_side_is_one_at_a_time(model: Any, slots: int, shared: int) -> None:
    prompts = random_prompts(30, seed=slots, shared=shared)
    completions = dict(decode(model, Numbers(), prompts, 40, slots=slots, stop=STOP))
    assert sorted(completions) == list(range(30))
    for i, prompt in enumerate(prompts):
        expected = generate_alone(model, prompt, 40, STOP)
        assert completions[i].token_ids == expected
        assert completions[i].text == " ".join(map(str, expected))
    lengths = {c.n_tokens for c in completions.values()}
    assert len(lengths) > 3, "the test wants texts of many lengths"


def test_slots_by_themselves_fit_work_and_memory(model: Any, monkeypatch: Any) -> None:
    prompts = random_prompts(7, seed=3)
    by_hand = dict(decode(model, Numbers(), prompts, 12, slots=2, stop=STOP))
    tally = DecodeTally()
    alone = dict(decode(model, Numbers(), prompts, 12, stop=STOP, tally=tally))
    assert alone == by_hand
    assert tally.slot_use > 0.3  # one slot a prompt, none of them refilled
    assert slots_that_fit(model, prompts, [12] * 7) == 7
    many = prompts * 1000
    assert slots_that_fit(model, many, [12] * len(many)) == max(256, 128 * torch.get_num_threads())
    longest = max(map(len, prompts)) + 12
    free = SimpleNamespace(available=4 * 3 * bytes_a_slot(model.config, longest))
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    assert slots_that_fit(model, many, [12] * len(many)) == 3
    free.available = 1
    assert slots_that_fit(model, prompts, [12] * 7) == 1


def test_groups_of_slots_read_no_more_than_they_need(model: Any, monkeypatch: Any) -> None:
    "Slots stay in order of length: short ones do not read a long one's columns"
    monkeypatch.setattr(slots, "GROUP", 4)
    seen: list[list[int]] = []
    views_of = SlotModel.views

    def views(self: SlotModel, requests: list[Any]) -> Any:
        groups = views_of(self, requests)
        assert all(
            n >= r.length for begin, end, n in groups for r in requests[begin:end]
        ) and groups[-1][1] == len(requests)
        seen.append([n for *_, n in groups])
        return groups

    monkeypatch.setattr(SlotModel, "views", views)
    prompts = random_prompts(30, seed=5)
    completions = dict(decode(model, Numbers(), prompts, 40, slots=24, stop=STOP))
    assert model.config._attn_implementation == "sdpa"
    for i, prompt in enumerate(prompts):
        assert completions[i].token_ids == generate_alone(model, prompt, 40, STOP)
    read, all_as_longest = (sum(map(sum, seen)), sum(max(n) * len(n) for n in seen))
    assert read < 0.95 * all_as_longest  # a third less or better where answers are long


def test_end_of_turn_and_truncation(model: Any) -> None:
    prompts = random_prompts(12, seed=3)
    cut = dict(decode(model, Numbers(), prompts, 5, slots=4, stop=set()))
    assert all(c.truncated and c.n_tokens == 5 for c in cut.values())
    first = {c.token_ids[0] for c in cut.values()}
    at_once = dict(decode(model, Numbers(), prompts, 5, slots=4, stop=first))
    assert all(c == Completion("", [], truncated=False) for c in at_once.values())
    last = {cut[0].token_ids[-1]}
    ended = dict(decode(model, Numbers(), prompts[:1], 5, slots=4, stop=last))[0]
    assert not ended.truncated and ended.n_tokens < 5 and not last & set(ended.token_ids)


def test_slots_are_refilled(model: Any) -> None:
    prompts = random_prompts(60, seed=5)
    torch.set_num_threads(1)
    tally = DecodeTally()
    completions = dict(decode(model, Numbers(), prompts, 60, slots=6, stop=STOP, tally=tally))
    torch.set_num_threads(2)
    lengths = [completions[i].n_tokens + (not completions[i].truncated) for i in range(60)]
    static_steps = sum(max(lengths[i : i + 6]) for i in range(0, 60, 6))
    assert tally.n_steps < 0.75 * static_steps
    assert tally.n_busy_slot_steps == sum(lengths) - 60  # the first token comes with the prompt
    assert tally.slot_use > 0.8


def test_limits_of_their_own(model: Any) -> None:
    prompts, limits = random_prompts(7), [3, 30, 1, 12, 5, 20, 8]
    got = dict(decode(model, Numbers(), prompts, limits, slots=4, stop=set()))
    whole = dict(decode(model, Numbers(), prompts, 30, slots=4, stop=set()))
    assert [got[i].n_tokens for i in range(7)] == limits
    assert all(got[i].token_ids == whole[i].token_ids[: limits[i]] for i in range(7))


def test_long_prompts_go_first_and_slots_stay_full(model: Any) -> None:
    "Answers as long as their questions: with the longest ones last, most slots would wait for them"
    rng = torch.Generator().manual_seed(1)
    lengths = (1 + 60 * torch.rand(64, generator=rng) ** 3).int().tolist()
    prompts = [torch.randint(0, VOCABULARY, (k,), generator=rng).tolist() for k in lengths]
    tally = DecodeTally()
    order = [i for i, _ in decode(model, Numbers(), prompts, lengths, 8, stop=set(), tally=tally)]
    assert sorted(order) == list(range(64)) and tally.n_busy_slot_steps == sum(lengths) - 64
    assert tally.slot_use > 0.9


def test_the_shared_beginning_is_read_once(model: Any) -> None:
    prompts, tally = random_prompts(20, seed=6, shared=100), DecodeTally()
    n_threads = torch.get_num_threads()
    list(decode(model, Numbers(), prompts, 2, slots=4, stop=set(), tally=tally))
    own = sum(len(p) - 100 for p in prompts)
    assert own <= tally.n_prompt_tokens <= own + 110 * n_threads
    twice = dict(decode(model, Numbers(), prompts[:1] * 3, 8, slots=2, stop=set()))
    assert twice[0] == twice[1] == twice[2]


def test_sampling_depends_on_the_seed_alone(model: Any) -> None:
    prompts = random_prompts(16, seed=8)
    seeds = list(range(100, 116))
    how: dict[str, Any] = {"temperature": 1.3, "top_p": 0.95, "stop": STOP}
    together = dict(decode(model, Numbers(), prompts, 20, slots=16, seed=seeds, **how))
    order = list(reversed(range(16)))
    backwards = dict(
        decode(
            model,
            Numbers(),
            [prompts[i] for i in order],
            20,
            slots=3,
            seed=[seeds[i] for i in order],
            **how,
        )
    )
    assert [together[i] for i in order] == [backwards[j] for j in range(16)]
    other = dict(
        decode(model, Numbers(), prompts, 20, slots=16, seed=[s + 1 for s in seeds], **how)
    )
    assert other != together


def test_sampling_draws_what_it_should() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]]).repeat(20_000, 1)
    draws = torch.rand(20_000, generator=torch.Generator().manual_seed(0)).tolist()
    counts = pick_tokens(logits, draws, temperature=0.7)[0].bincount(minlength=4) / 20_000
    torch.testing.assert_close(counts, (logits[0] / 0.7).softmax(-1), atol=0.01, rtol=0)
    nucleus = pick_tokens(logits, draws, temperature=0.7, top_p=0.9)[0].bincount(minlength=4)
    assert nucleus[2:].sum() == 0 and nucleus[1] > 0
    assert pick_tokens(logits[:2], [0.0, 1 - 1e-12], top_p=0.5)[0].tolist() == [0, 0]


class NoisyAgainstNeighbours(torch.nn.Module):
    "A model whose logits shift a little with the number of rows, as matrix products do"

    def __init__(self, inner: Any):
        super().__init__()
        self.inner, self.config, self.device = inner, inner.config, inner.device
        self.get_input_embeddings = inner.get_input_embeddings

    def forward(self, input_ids: torch.Tensor, **kwargs: Any) -> Any:
        out = self.inner(input_ids=input_ids, **kwargs)
        wave = torch.sin(torch.arange(VOCABULARY) * input_ids.numel() * 1.7) * 2e-4
        out.logits = torch.round(out.logits * 4) / 4 + wave  # ties everywhere, broken by the noise
        return out


def test_near_ties_are_settled_alone(model: Any) -> None:
    noisy, prompts, tally = NoisyAgainstNeighbours(model), random_prompts(12, seed=9), DecodeTally()
    together = dict(decode(noisy, Numbers(), prompts, 20, slots=12, stop=set(), tally=tally))
    assert tally.n_settled > 10, "the test wants near ties"
    for i, prompt in enumerate(prompts):
        assert dict(decode(noisy, Numbers(), [prompt], 20, slots=1, stop=set()))[0] == together[i]


@pytest.mark.parametrize(
    ("prompts", "options", "message"),
    [
        ([[1], []], {}, "prompt 1 has 0 tokens"),
        ([[1] * 250], {}, "prompt 0 has 250 tokens"),
        ([[1]], {"slots": 0}, "slots >= 1"),
    ],
)
def test_what_cannot_be_decoded(model: Any, prompts: list, options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(decode(model, Numbers(), prompts, 8, stop=set(), **options))


def test_nothing_to_decode(model: Any) -> None:
    assert list(decode(model, Numbers(), [], 8, stop=set())) == []


class Breaks(NoisyAgainstNeighbours):
    def forward(self, **kwargs: Any) -> Any:
        raise RuntimeError("out of memory, say")


def test_a_worker_that_fails_is_heard(model: Any) -> None:
    with pytest.raises(RuntimeError, match="out of memory"):
        list(decode(Breaks(model), Numbers(), random_prompts(8), 8, stop=set()))


def test_leaving_early_stops_the_workers(model: Any) -> None:
    before, n_threads = threading.active_count(), torch.get_num_threads()
    stream: Iterator = decode(model, Numbers(), random_prompts(50), 60, slots=4, stop=set())
    next(stream)
    stream.close()
    assert threading.active_count() == before and torch.get_num_threads() == n_threads


def test_layout_changes_no_value(model: Any) -> None:
    before = {k: v.clone() for k, v in model.state_dict().items()}
    lay_out(model)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.fixture
def adapted(model: Any) -> Iterator[PeftModel]:
    torch.manual_seed(11)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", init_lora_weights=False)
    both = get_peft_model(model, lora, adapter_name="first")
    both.add_adapter("second", lora)
    yield both.eval()
    both.unload()


def test_adapters_do_not_leak(adapted: PeftModel) -> None:
    prompts = random_prompts(10, seed=12)

    def answers(name: str | None) -> dict[int, Completion]:
        with use_adapter(adapted, name):
            return dict(decode(adapted, Numbers(), prompts, 12, slots=4, stop=STOP))

    weights = [m.weight.clone() for m in adapted.modules() if type(m) is torch.nn.Linear]
    base, a, b = answers(None), answers("first"), answers("second")
    assert len({str(x) for x in (base, a, b)}) == 3
    assert (answers("first"), answers(None), answers("second")) == (a, base, b)
    now = [m.weight for m in adapted.modules() if type(m) is torch.nn.Linear]
    assert all(torch.equal(x, y) for x, y in zip(weights, now, strict=True))


def test_folded_adapter_says_what_it_says_beside(adapted: PeftModel) -> None:
    ids = torch.tensor(random_prompts(1, seed=13))
    with torch.no_grad():
        adapted.set_adapter("second")
        beside = adapted(ids).logits
        with use_adapter(adapted, "second"):
            folded = adapted(ids).logits
        with pytest.raises(ZeroDivisionError), use_adapter(adapted, "second"):
            1 / 0  # noqa: B018
        torch.testing.assert_close(adapted(ids).logits, beside)
    torch.testing.assert_close(folded, beside, atol=1e-3, rtol=1e-3)


def test_pretrained_student_side_by_side_is_alone() -> None:
    cfg = StudentConfig(model="smollm2-135m", dtype="float32", device="cpu")
    student, tokenizer = load_student(cfg)
    prompts = [
        prompt_ids(tokenizer, p.question, cfg) for p in load_problems("two-step", "test", limit=8)
    ]
    stop = stop_ids(student, tokenizer)
    completions = dict(decode(student, tokenizer, prompts, 16, slots=3))
    for i in (0, 3):
        expected = generate_alone(student, prompts[i], 16, stop)
        assert completions[i].token_ids == expected
        assert completions[i].text == tokenizer.decode(expected)


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_answers_are_the_same_when_memory_runs_out_on_the_way(
    model: Any,
    temperature: float,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
):
    prompts, read = random_prompts(14, seed=3), SlotModel.read_tokens
    how = {"max_new_tokens": 12, "temperature": temperature, "stop": STOP}
    expected = dict(decode(model, Numbers(), prompts, slots=8, **how))
    n_calls = iter(range(10**6))

    def read_in_little_memory(self: SlotModel, requests: list[Any]) -> torch.Tensor:
        if len(requests) > 1 and next(n_calls) > 5:  # the first answers have ended by then
            raise torch.OutOfMemoryError("CUDA out of memory")
        return read(self, requests)

    monkeypatch.setattr(SlotModel, "read_tokens", read_in_little_memory)
    found = list(decode(model, Numbers(), prompts, slots=8, **how))
    assert len(found) == 14
    assert dict(found) == expected
    assert "2 answers side by side from here on" in capsys.readouterr().err


def test_no_memory_for_one_answer_is_a_sentence_and_other_errors_stay_errors(
    model: Any, monkeypatch: pytest.MonkeyPatch
):
    def fail(self: SlotModel, requests: list[Any]) -> torch.Tensor:
        raise RuntimeError(said)

    monkeypatch.setattr(SlotModel, "read_tokens", fail)
    said = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 byte"
    with pytest.raises(InputError, match="one answer at a time.*eval.max_new_tokens"):
        list(decode(model, Numbers(), random_prompts(3), 12, slots=2, stop=set()))
    said = "shapes do not match"
    with pytest.raises(RuntimeError, match="shapes do not match"):
        list(decode(model, Numbers(), random_prompts(3), 12, slots=2, stop=set()))
