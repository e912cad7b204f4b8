"""What a reward may look like, and what is refused before anything starts."""

from __future__ import annotations

import functools

import pytest

from nemo_rl.environments import (
    Environment,
    RewardCall,
    batched_reward,
    bind_rewards,
    reward_function,
    validate_reward_callable,
)
from nemo_rl.environments.signature import RewardSignature

CALL = RewardCall("p", "r", None, {"answer": "4", "level": 3, "response": "gold"})


def plain(prompt, response):
    return 1.0


async def asynchronous(prompt, response):
    return 1.0


def batch(prompts, responses, answer):
    return [1.0 for _ in prompts]


class Scorer:
    def __call__(self, prompt, response, answer):
        return 1.0

    def method(self, prompt, response):
        return 1.0


def call_with(fn, call: RewardCall = CALL):
    args, keywords = RewardSignature.of(fn).arguments(call)
    return fn(*args, **keywords)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda prompt, response: (prompt, response), ("p", "r")),
        (lambda response, prompt: (prompt, response), ("p", "r")),
        (lambda question, completion: (question, completion), ("p", "r")),
        (lambda prompt, completion, answer: (prompt, completion, answer), ("p", "r", "4")),
        (lambda answer, prompt, response: (prompt, response, answer), ("p", "r", "4")),
        (lambda prompt, response, *, level: (prompt, response, level), ("p", "r", 3)),
        (lambda prompt, response, level=7, missing=9: (level, missing), (3, 9)),
        (lambda prompt, response, **columns: (response, columns), ("r", {"answer": "4", "level": 3})),
        (lambda a, b, /, **columns: (b, columns), ("r", {"answer": "4", "level": 3, "response": "gold"})),
        (lambda *args, **columns: (args, sorted(columns)), (("p", "r"), ["answer", "level", "response"])),
        (lambda prompt, response, messages: messages, [{"role": "user", "content": "p"}]),
        (functools.partial(lambda scale, prompt, response: (scale, prompt, response), 2), (2, "p", "r")),
        (functools.partial(lambda prompt, response, scale: (scale, prompt, response), scale=2), (2, "p", "r")),
    ],
)
def test_arguments_are_given_by_name_and_place(fn, expected):
    assert call_with(fn) == expected


def test_a_reward_called_messages_gets_the_whole_conversation():
    messages = [{"role": "system", "content": "s"}, {"role": "user", "content": "p"}]
    assert call_with(lambda prompt, response, messages: messages, RewardCall("p", "r", messages)) == messages


def test_a_batched_reward_gets_lists_with_none_for_what_a_row_lacks():
    calls = [RewardCall("p0", "r0", None, {"answer": 1, "hint": "h"}), RewardCall("p1", "r1", None, {"answer": 2})]
    signature = RewardSignature.of(lambda prompts, responses, answer, hint="no", other="no": None)
    assert signature.batched
    assert signature.batch_arguments(calls) == (
        (),
        {"prompts": ["p0", "p1"], "responses": ["r0", "r1"], "answer": [1, 2], "hint": ["h", None]},
    )


@pytest.mark.parametrize(
    ("fn", "batched", "is_async"),
    [
        (plain, False, False),
        (asynchronous, False, True),
        (batch, True, False),
        (Scorer(), False, False),
        (Scorer().method, False, False),
        (functools.partial(asynchronous), False, True),
        (batched_reward(lambda questions, texts: []), True, False),
    ],
)
def test_kinds_are_told_apart(fn, batched, is_async):
    signature = RewardSignature.of(fn)
    assert (signature.batched, signature.is_async) == (batched, is_async)


@pytest.mark.parametrize(
    ("fn", "said"),
    [
        (lambda: 1.0, "takes 0 positional parameters"),
        (lambda text: 1.0, "takes 1 positional parameters"),
        (lambda question, prompt: 1.0, "'prompt' stands in the place of the response"),
        (lambda question, answer: 1.0, "'answer' stands in the place of the response"),
        (lambda prompt, reference: 1.0, "'reference' stands in the place of the response"),
        (lambda prediction, gold: 1.0, "'prediction' stands in the place of the prompt"),
        (lambda prompts, labels: 1.0, "'labels' stands in the place of the response"),
        (lambda prompt, response, answer, /: 1.0, "'answer' is positional-only"),
        (lambda prompt, response: (yield 1.0), "a generator"),
        (Scorer, "give Scorer(...)"),
        (Environment, "overrides none of score"),
        (type("Needs", (Environment,), {"__init__": lambda self, path: None}), "give an instance"),
        ("math_answer", "found the text 'math_answer'"),
        (0.5, "cannot be called"),
    ],
)
def test_what_cannot_work_is_refused_with_the_cure(fn, said):
    with pytest.raises(TypeError) as caught:
        bind_rewards(fn)
    assert said in str(caught.value)
    assert validate_reward_callable(fn) == (False, str(caught.value))


def test_a_reward_that_can_be_called_is_valid():
    assert validate_reward_callable(plain) == (True, None)


def test_a_missing_column_is_named_with_those_that_are_there_and_the_nearest():
    def reward(prompt, response, anwser):
        return 1.0

    with pytest.raises(TypeError) as caught:
        bind_rewards(reward, columns={"answer", "level"})
    assert "'anwser'" in str(caught.value)
    assert "answer, level" in str(caught.value)
    assert "did you mean 'answer'?" in str(caught.value)
    bind_rewards(reward, columns=None)
    bind_rewards(lambda prompt, response, anwser=None: 1.0, columns={"answer"})


def test_a_built_in_needs_one_of_its_columns():
    from nemo_rl.environments import exact_match

    bind_rewards(exact_match, columns={"ground_truth"})
    with pytest.raises(TypeError, match=r"answer, expected_answer, ground_truth; columns found: level"):
        bind_rewards(exact_match, columns={"level"})


def test_decorators_check_at_once_and_leave_the_function_as_it_is():
    @reward_function(name="quality", in_process=True)
    def reward(prompt, response):
        return 0.5

    assert reward("p", "r") == 0.5
    (bound,) = bind_rewards(reward).rewards
    assert (bound.name, bound.in_process) == ("quality", True)
    assert bind_rewards(reward_function(Scorer().method)).rewards[0].name == "method"
    with pytest.raises(TypeError, match="takes 1 positional"):
        reward_function(lambda text: 1.0)


def test_weights_by_list_and_by_name():
    assert [r.weight for r in bind_rewards([plain, batch], [0.5, 2]).rewards] == [0.5, 2.0]
    assert [r.weight for r in bind_rewards({"a": plain, "b": batch}, {"b": 3}).rewards] == [1.0, 3.0]


@pytest.mark.parametrize(
    ("reward_fn", "weights", "error", "said"),
    [
        ([plain, batch], [1.0], ValueError, "found 1 reward weights for 2 rewards"),
        (plain, [float("nan")], ValueError, "expected a finite number"),
        (plain, [True], ValueError, "expected a finite number"),
        ({"style": plain}, {"stlye": 1.0}, ValueError, "did you mean 'style'?"),
        (plain, 2.0, TypeError, "expected a list or a dict"),
        ([], None, ValueError, "empty collection"),
        ({1: plain}, None, TypeError, "expected names"),
    ],
)
def test_weights_and_collections_that_do_not_fit_are_refused(reward_fn, weights, error, said):
    with pytest.raises(error) as caught:
        bind_rewards(reward_fn, weights)
    assert said in str(caught.value)


def test_names_are_distinct_and_come_from_the_functions():
    lambdas = [lambda prompt, response: 1.0, lambda prompt, response: 2.0]
    assert [r.name for r in bind_rewards([plain, plain, *lambdas]).rewards] == [
        "plain",
        "plain_2",
        "reward_3",
        "reward_4",
    ]


def test_built_ins_and_functions_are_mixed_by_name():
    listed, named = bind_rewards(["exact_match", plain, "length"]), bind_rewards({"right": "exact_match", "own": plain})
    assert [r.name for r in listed.rewards] == ["exact_match", "plain", "length"]
    assert [r.name for r in named.rewards] == ["right", "own"]
    right = listed.rewards[0].target
    assert (right("2+2=", "4", answer="4"), right("2+2=", "5", answer="4")) == (1.0, 0.0)
    with pytest.raises(TypeError, match=r"found the text 'exact_mach'; expected .*did you mean 'exact_match'"):
        bind_rewards([plain, "exact_mach"])
    with pytest.raises(TypeError, match=r"'package\.module:name' is a whole reward_fn"):
        bind_rewards([plain, "my.module:score"])


def test_environments_use_the_most_specific_method():
    class Async(Environment):
        async def score_async(self, prompt, response, **columns):
            return 1.0

    class Batch(Environment):
        def score_batch(self, prompts, responses, **columns):
            return [1.0] * len(prompts)

    class Both(Batch, Async):
        pass

    class One(Environment):
        def score(self, prompt, response, answer):
            return 1.0

    kinds = [bind_rewards(kind).rewards[0].signature for kind in (Async, Batch, Both(), One)]
    assert [(s.batched, s.is_async) for s in kinds] == [(False, True), (True, False), (False, True), (False, False)]
    with pytest.raises(TypeError, match="'answer'"):
        bind_rewards(One, columns=set())
    assert One().score_batch(["p", "q"], ["r", "s"], answer=[1, 2]) == [1.0, 1.0]


def test_the_identity_of_rewards_follows_their_code_and_weights_not_their_place():
    def make(text):
        space: dict = {}
        exec(text, space)
        return space["reward"]

    one = "def reward(prompt, response):\n    return float('a' in response)"
    same, other = "\n\n# moved\n" + one, one.replace("'a'", "'b'")
    identities = [bind_rewards(make(text)).identity for text in (one, same, other)]
    assert identities[0] == identities[1] != identities[2]
    assert bind_rewards(make(one), [2.0]).identity != identities[0]


# --- names of the data set and of other libraries

ROW = {"answer": "4", "data_source": "gsm8k", "ground_truth": "5", "label": "L", "days": [1]}


def called(fn, columns=tuple(ROW), **more):
    """What a reward gets for one completion, or one batched call for two."""
    signature = bind_rewards(fn, columns=columns).rewards[0].signature
    signature.check_columns("the reward", columns)
    calls = [RewardCall("p", r, None, {n: ROW[n] for n in columns if n in ROW}, **more) for r in ("r", "s")]
    args, keywords = signature.batch_arguments(calls) if signature.batched else signature.arguments(calls[0])
    return fn(*args, **keywords)


@pytest.mark.parametrize(
    ("fn", "expected"),
    [
        (lambda completion, answer: (completion, answer), ("r", "4")),
        (lambda answer, response: (answer, response), ("4", "r")),
        (lambda response, answer: (response, answer), ("r", "4")),
        (lambda response: response, "r"),
        (lambda prompt, completion, label: (prompt, completion, label), ("p", "r", "L")),
        (lambda label, prompt, completion: (label, prompt, completion), ("L", "p", "r")),
        (
            lambda data_source, solution_str, ground_truth, extra_info=None: (data_source, solution_str, ground_truth, extra_info),
            ("gsm8k", "r", "5", None),
        ),
        (lambda prompts, completions, **kwargs: (prompts, completions, kwargs["answer"]), (["p"] * 2, ["r", "s"], ["4"] * 2)),
        (lambda completions, ground_truth, **kwargs: (completions, ground_truth), (["r", "s"], ["5", "5"])),
        (lambda queries, prompts, labels: (queries, prompts, labels), (["pr", "ps"], ["p", "p"], ["L", "L"])),
    ],
)  # fmt: skip
def test_names_of_columns_and_of_other_libraries_get_what_they_say(fn, expected):
    assert called(fn) == expected


@pytest.mark.parametrize(
    ("fn", "columns", "said"),
    [
        (lambda question, answer: 1.0, ["question", "answer"], "'question' stands in the place of the prompt"),
        (lambda x, answer: 1.0, ["answer"], "is a column of the data set"),
        (lambda text, label: 1.0, ["label"], "stands in the place of"),
        (lambda prompt, completion: 1.0, ["completion"], "in other libraries what the model wrote"),
        (
            lambda data_source, solution_str, ground_truth: 1.0,
            ["answer"],
            "'data_source', but the data set has no such",
        ),
        (lambda queries, prompts, labels: 1.0, ["answer"], "'labels', but the data set has no such column"),
        (lambda response, reference: 1.0, ["answer"], "'reference', but the data set has no such column"),
        (lambda completions, completion_ids: 1.0, ["answer"], "'completion_ids', but the data set has no such column"),
    ],
)
def test_doubt_is_refused_rather_than_filled_with_something_else(fn, columns, said):
    with pytest.raises(TypeError, match=said):
        bind_rewards(fn, columns=columns)


def test_verls_ground_truth_is_found_in_its_reward_model():
    def compute_score(data_source, solution_str, ground_truth, extra_info=None):
        return ground_truth

    row = {"data_source": "d", "reward_model": {"ground_truth": "7", "style": "rule"}}
    signature = bind_rewards(compute_score, columns=row).rewards[0].signature
    args, keywords = signature.arguments(RewardCall("p", "r", None, row))
    assert compute_score(*args, **keywords) == "7"


def test_trls_conversations_are_lists_of_messages():
    def reward(prompts, completions, **kwargs):
        return [completion[0]["content"] for completion in completions], prompts

    messages = [{"role": "user", "content": "hi"}]
    signature = bind_rewards(reward, columns=[]).rewards[0].signature
    args, keywords = signature.batch_arguments([RewardCall("hi", "r", messages)])
    assert reward(*args, **keywords) == (["r"], [messages])


def test_step_epoch_and_special_tokens_come_when_they_are_asked_for():
    def reward(prompt, response, step, epoch=9, response_raw=""):
        return step, epoch, response_raw

    assert called(reward, step=3, epoch=1, response_raw="<a>r</a>") == (3, 1, "<a>r</a>")
    assert called(lambda prompt, response, answer, step: step, columns=("answer",), step=3) == 3


def test_a_bound_argument_is_not_replaced_by_a_column():
    assert called(functools.partial(lambda prompt, response, label: label, label="mine")) == "mine"


def test_a_reward_changes_its_row_for_itself_alone():
    def reward(prompt, response, days):
        days.append(2)
        return len(days)

    assert [called(reward), called(reward), ROW["days"]] == [2, 2, [1]]


def test_a_name_may_be_given_to_environments_and_decorators():
    class Judge(Environment):
        def score(self, prompt, response):
            return 1.0

    @reward_function("quality")
    def first(prompt, response):
        return 1.0

    @batched_reward("all")
    def second(prompts, responses):
        return [1.0 for _ in prompts]

    assert [r.name for r in bind_rewards([Judge(name="strict"), Judge(), first, second]).rewards] == [
        *("strict", "Judge", "quality", "all")
    ]
